import copy
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from files import assert_same, load, save, snapshot, weight_bytes
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from gtr_turbo.merging import MergeError, merge
from gtr_turbo.merging.methods import Recipe
from gtr_turbo.merging.tensors import merge_tensors

TARGETS = ["q_proj", "k_proj", "down_proj"]
PREFIX = "base_model.model."


def llama(path, *, dtype=torch.float32, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **config})).to(dtype)
    model.save_pretrained(path)
    return path


def adapted(model, config, seed):
    """A PEFT model whose factors are noise, as if it had been trained."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def train(base, out, seed, **config):
    """Save an adapter of `base`; returns dW of each module as PEFT computes it."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}
    model = adapted(LlamaForCausalLM.from_pretrained(base), LoraConfig(**config), seed)
    model.save_pretrained(out)
    return changes(model)


@torch.no_grad()
def changes(model, adapter="default"):
    return {
        name.removeprefix(PREFIX): layer.get_delta_weight(adapter)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def handmade(path, factors, **config):
    """An adapter folder from {module: (A, B)}, without PEFT."""
    path.mkdir(parents=True)
    rank = next(iter(factors.values()))[0].shape[0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": rank,
        **config,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def noise(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def merged_changes(deltas, method="ties", seed=0, **recipe):
    """Of each module, by `merge_tensors`; `seed` names the tensor for the random drop."""
    recipe = {"weights": (1 / len(deltas),) * len(deltas), "density": 0.8, **recipe}
    if method in ("linear", "task-arithmetic"):
        recipe["density"] = 1.0
    made = Recipe(method=method, **recipe)
    found = {}
    for module in deltas[0]:
        key = int.from_bytes(module.encode(), "little") % ((1 << 61) - 1)
        found[module] = merge_tensors([d[module].contiguous() for d in deltas], made, seed=key)
    return found


def products(folder):
    """B @ A of each module of an adapter whose scale is 1, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            assert a.shape[0] == b.shape[1] == config["r"]
            found[name.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = (
                b.double() @ a.double()
            )
    return found


def loss(wanted, found):
    """Fraction of the squared norm that is missing."""
    wanted = wanted.double()
    return float((wanted - found).square().sum() / wanted.square().sum())


def best_loss(wanted, rank):
    values = torch.linalg.svdvals(wanted.double()).square()
    return float(values[rank:].sum() / values.sum())


def refused(paths, out, *parts, **options):
    before = snapshot(out.parent)
    with pytest.raises(MergeError) as caught:
        merge(paths, out, **options)
    for part in parts:
        assert str(part) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(out.parent) == before


def on(form, base):
    """The base, where the form needs one."""
    return {"base": base} if form == "dense" else {}


def bounded(form):
    """No bound on the loss, of the forms that can lose something."""
    return {"max_lost": 1} if form in ("adapter", "cat") else {}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a Llama with random weights."""
    return llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def three(base, tmp_path_factory):
    """(folders of three adapters, their dW)."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = [folder / f"adapter-{k}" for k in range(3)]
    return paths, [train(base, path, seed) for seed, path in enumerate(paths)]


# -- dense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["ties", "linear", "task-arithmetic", "dare-linear", "dare-ties"]
)
def test_dense_is_the_base_plus_the_merged_changes(base, three, tmp_path, method):
    paths, deltas = three
    before = snapshot(base, *paths)
    report = merge(paths, tmp_path / "out", base=base, method=method)
    assert snapshot(base, *paths) == before
    wanted = load(base)
    for module, change in merged_changes(deltas, method).items():
        wanted[f"{module}.weight"] += change
    found = load(tmp_path / "out")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    untouched = [n for n in wanted if not any(target in n for target in TARGETS)]
    assert_same({n: found[n] for n in untouched}, {n: load(base)[n] for n in untouched})
    assert (report.plan.kind, report.plan.form) == ("lora", "dense")
    assert (report.plan.tensors, report.plan.merged) == (len(wanted), 6)
    assert set(report.manifest["tensors"]) == {f"{module}.weight" for module in deltas[0]}


def test_dense_takes_weights_and_lambda(base, three, tmp_path):
    paths, deltas = three
    merge(paths, tmp_path / "out", base=base, weights=[1, 2, 3], lam=-0.5, density=0.3)
    found = load(tmp_path / "out")
    for module, change in merged_changes(deltas, weights=(1.0, 2.0, 3.0), density=0.3).items():
        wanted = load(base)[f"{module}.weight"] - 0.5 * change
        torch.testing.assert_close(found[f"{module}.weight"], wanted, rtol=0, atol=1e-6)


def test_a_dense_merge_loads_in_stock_transformers(base, three, tmp_path):
    paths, deltas = three
    merge(paths, tmp_path / "out", base=base, method="linear", shard_bytes=20_000)
    state = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_same({name: state[name] for name in load(base)}, load(tmp_path / "out"))
    module = next(iter(deltas[0]))
    assert not torch.equal(state[f"{module}.weight"], load(base)[f"{module}.weight"])


def test_a_layer_of_several_pieces_is_merged_as_a_whole(tmp_path):
    out, into = 300, 600  # more than `jobs.CHUNK`
    factors = [noise(k, (8, into), (out, 8)) for k in range(3)]
    paths = [handmade(tmp_path / str(k), {"layer": pair}) for k, pair in enumerate(factors)]
    origin = save(tmp_path / "base", {"layer.weight": noise(9, (out, into))[0]})
    deltas = [b @ a for a, b in factors]
    for threads in (1, 2):
        merge(paths, tmp_path / f"out-{threads}", base=origin, threads=threads)
    assert weight_bytes(tmp_path / "out-1") == weight_bytes(tmp_path / "out-2")
    wanted = merge_tensors(deltas, Recipe(weights=(1 / 3,) * 3, density=0.8))
    found = load(tmp_path / "out-1")["layer.weight"] - load(origin)["layer.weight"]
    # products of blocks may round unlike the product of all, which moves an entry at the threshold
    assert int(((found - wanted).abs() > 1e-5).sum()) <= 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_has_the_type_of_the_base_or_the_one_that_was_asked_for(tmp_path, dtype):
    kind = getattr(torch, dtype)
    origin = llama(tmp_path / "base", dtype=kind)
    paths = [tmp_path / f"adapter-{k}" for k in range(2)]
    deltas = [train(origin, path, seed) for seed, path in enumerate(paths)]
    merge(paths, tmp_path / "own", base=origin, method="linear")
    merge(paths, tmp_path / "wide", base=origin, method="linear", dtype="float32")
    own, wide = load(tmp_path / "own"), load(tmp_path / "wide")
    assert {tensor.dtype for tensor in own.values()} == {kind}
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    before = load(origin)
    for name, tensor in wide.items():
        assert torch.equal(own[name], tensor.to(kind))
        change = sum(d[name.removesuffix(".weight")] for d in deltas) / 2 if is_target(name) else 0
        torch.testing.assert_close(tensor, before[name].float() + change, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_merge_loads_in_stock_transformers_in_the_type_it_was_written_in(tmp_path, kind):
    other = "bfloat16" if kind == "float32" else "float32"
    origin = llama(tmp_path / "base", dtype=getattr(torch, other))
    config = json.loads((origin / "config.json").read_text())
    assert config["dtype"] == other
    tensors = {name: t.to(getattr(torch, kind)) for name, t in load(origin).items()}
    paths = [save(tmp_path / str(k), tensors) for k in range(2)]
    merge(paths, tmp_path / "out", base=origin)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{kind}"}
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert found == config | {"dtype": kind}


def is_target(name):
    return any(f"{target}.weight" in name for target in TARGETS)


def test_a_copied_weight_that_does_not_fit_is_refused(base, three, tmp_path):
    paths, _ = three
    tensors = load(base)
    tensors["model.embed_tokens.weight"][0, 0] = 70000.0  # is not adapted
    large = save(tmp_path / "large", tensors)
    options = {"base": large, "dtype": "float16"}
    refused(paths, tmp_path / "out", "'model.embed_tokens.weight'", **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_named(base, three, tmp_path, value):
    paths, deltas = three
    name = next(iter(deltas[0])) + ".weight"
    tensors = load(base)
    tensors[name][1, 2] = value
    broken = save(tmp_path / "broken", tensors)
    refused(paths, tmp_path / "out", repr(name), "broken", "not finite", base=broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_copied_weight_that_is_not_finite_is_named(base, three, tmp_path, value):
    tensors = load(base)
    tensors["model.embed_tokens.weight"][0, 0] = value  # is not adapted
    broken = save(tmp_path / "broken", tensors)
    parts = ("'model.embed_tokens.weight'", "broken", "not finite")
    refused(three[0], tmp_path / "out", *parts, base=broken)


@pytest.mark.parametrize("form", [{"form": "cat"}, {"form": "cat", "rank": 2}, {"form": "adapter"}])
def test_a_change_that_does_not_fit_an_adapter_is_refused(three, tmp_path, form):
    options = {"method": "task-arithmetic", "weights": [9, 9, 9], "lam": 3e38, **form}
    refused(three[0], tmp_path / "out", "module", "does not fit float32", **options)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_change_too_large_to_be_cut_is_refused(tmp_path):
    """It is finite, and its product with the sketch is not."""
    large = tuple(3e18 * side.sign() for side in noise(0, (2, 64), (64, 2)))
    paths = [handmade(tmp_path / str(k), {"layer": large}) for k in range(2)]
    refused(paths, tmp_path / "out", "'layer'", "does not fit float32", form="adapter", rank=1)


# -- scales ----------------------------------------------------------------------------------------

SCALES = {
    "another rank": {"r": 2},
    "another alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "r": 9},
    "rank pattern": {"rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.down_proj": 3}},
    "alpha pattern": {"alpha_pattern": {r"layers\.0\..*": 5, "k_proj": 31}},
    "patterns that match a part of a name": {
        "alpha_pattern": {"proj": 9, "layers.0": 5, "_proj": 3}
    },
    "both and rslora": {
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"k_proj": 5, "model.layers.1.self_attn.k_proj": 13},
    },
    "gaussian init": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("what", SCALES)
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
def test_a_change_is_scaled_as_peft_scales_it(base, three, tmp_path, what):
    paths, deltas = three
    train(base, tmp_path / "odd", 7, **SCALES[what])
    # read back: PEFT sorts the patterns when it saves, and the first that matches counts
    odd = changes(
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "odd")
    )
    merge([paths[0], tmp_path / "odd"], tmp_path / "out", base=base, method="linear")
    found, origin = load(tmp_path / "out"), load(base)
    for module, change in odd.items():
        name = f"{module}.weight"
        wanted = origin[name] + (change + deltas[0][module]) / 2
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6)


# -- a low rank ------------------------------------------------------------------------------------


def test_an_adapter_of_full_rank_gives_the_logits_of_the_dense_merge(base, three, tmp_path):
    paths, _ = three
    merge(paths, tmp_path / "dense", base=base)
    merge(paths, tmp_path / "adapter", form="adapter", rank=32)
    ids = torch.arange(12)[None]
    origin = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        unadapted = origin(ids).logits
        wanted = LlamaForCausalLM.from_pretrained(tmp_path / "dense")(ids).logits
        found = PeftModel.from_pretrained(origin, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert float((wanted - unadapted).abs().max()) > 1e-2


@pytest.mark.parametrize("method", ["ties", "linear", "task-arithmetic", "dare-ties"])
def test_a_low_rank_is_close_to_the_best_and_its_loss_is_told(three, tmp_path, method):
    paths, deltas = three
    report = merge(paths, tmp_path / "out", form="adapter", method=method, max_lost=1)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == report.manifest["settings"]["rank"] == 8  # twice the inputs'
    found = products(tmp_path / "out")
    assert set(found) == set(deltas[0])
    if method == "dare-ties":  # the dense merge draws by another name
        return
    for module, wanted in merged_changes(deltas, method).items():
        true = loss(wanted, found[module])
        assert true <= 1.05 * best_loss(wanted, 8)
        for side in "AB":
            lines = report.manifest["tensors"][f"{PREFIX}{module}.lora_{side}.weight"]
            assert lines["energy_lost"] == pytest.approx(true, rel=0.01)
            assert lines["entries"] == wanted.numel()


def test_the_sketch_of_a_large_layer_is_close_to_the_best(tmp_path):
    factors = [noise(k, (8, 260), (300, 8)) for k in range(4)]
    paths = [handmade(tmp_path / str(k), {"layer": pair}) for k, pair in enumerate(factors)]
    recipe = Recipe(weights=(1 / 4,) * 4, density=0.8)
    wanted = merge_tensors([b @ a for a, b in factors], recipe)
    for rank in (1, 16, 40):
        out = tmp_path / f"out-{rank}"
        report = merge(paths, out, form="adapter", rank=rank, max_lost=1)
        true = loss(wanted, products(out)["layer"])
        assert 0.1 < best_loss(wanted, rank) <= true + 1e-6 <= 1.05 * best_loss(wanted, rank)
        (lost,) = {lines["energy_lost"] for lines in report.manifest["tensors"].values()}
        assert lost == pytest.approx(true, rel=0.01)


def test_a_merge_of_one_adapter_with_itself_is_that_adapter(base, three, tmp_path):
    paths, deltas = three
    report = merge([paths[0]] * 2, tmp_path / "out", form="adapter", rank=4, density=1.0)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "out")
    for module, change in changes(model).items():
        torch.testing.assert_close(change, deltas[0][module], rtol=0, atol=1e-6)
    assert max(lines["energy_lost"] for lines in report.manifest["tensors"].values()) < 1e-5


def test_an_adapter_of_zeros_loses_nothing(tmp_path):
    zeros = {"layer": (torch.ones(2, 6), torch.zeros(5, 2))}
    paths = [handmade(tmp_path / name, zeros) for name in "ab"]
    report = merge(paths, tmp_path / "out", form="adapter")
    assert not products(tmp_path / "out")["layer"].any()
    assert {lines["energy_lost"] for lines in report.manifest["tensors"].values()} == {0.0}


def test_a_rank_that_loses_too_much_is_refused(three, tmp_path):
    paths, deltas = three
    options = {"form": "adapter", "rank": 1}
    refused(paths, tmp_path / "out", "module 'model.layers.", "rank 1 loses", "10.0%", **options)
    wanted = merged_changes(deltas)
    worst = max(best_loss(change, 6) for change in wanted.values())
    options = {"form": "adapter", "rank": 6}
    refused(paths, tmp_path / "out", "rank 6 loses", max_lost=worst * 0.95, **options)
    merge(paths, tmp_path / "out", max_lost=worst * 1.05, **options)


def test_the_seed_is_of_the_sketch_and_nothing_else_is_random(three, tmp_path):
    paths, _ = three
    options = {"form": "adapter", "max_lost": 1, "rank": 2}
    for name, seed in (("one", 1), ("again", 1)):
        merge(paths, tmp_path / name, seed=seed, **options)
    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "again")


def test_the_random_drop_is_another_in_every_module_and_seed(tmp_path):
    pair = noise(0, (4, 20), (20, 4))
    paths = [handmade(tmp_path / name, {"one": pair, "two": copy.deepcopy(pair)}) for name in "ab"]
    options = {"form": "adapter", "rank": 20, "method": "dare-linear", "density": 0.5}
    found = []
    for seed in (0, 1):
        merge(paths, tmp_path / str(seed), seed=seed, **options)
        found += products(tmp_path / str(seed)).values()
    change = pair[1] @ pair[0]
    kept = [(product / change).round() for product in found]
    for i, counts in enumerate(kept):
        torch.testing.assert_close(found[i].float(), counts.float() * change, rtol=0, atol=1e-4)
        assert counts.unique().tolist() == [0, 1, 2]  # adapters that kept the entry
        assert not any(torch.equal(counts, other) for other in kept[:i])


def test_lambda_multiplies_a_low_rank_too(three, tmp_path):
    paths, _ = three
    for lam in (1.0, 3.0):
        merge(paths, tmp_path / str(lam), form="adapter", rank=32, lam=lam)
    tripled = products(tmp_path / "3.0")
    for module, change in products(tmp_path / "1.0").items():
        torch.testing.assert_close(tripled[module], 3 * change, rtol=0, atol=1e-5)


def test_an_adapter_needs_no_base_and_keeps_its_config(base, three, tmp_path):
    paths, _ = three
    merge(paths, tmp_path / "out", form="adapter", max_lost=1)
    ours = json.loads((tmp_path / "out/adapter_config.json").read_text())
    theirs = json.loads((paths[-1] / "adapter_config.json").read_text())
    assert ours["base_model_name_or_path"] == str(base)
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])
    assert ours["task_type"] == theirs["task_type"]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "merged-from.json"} <= names


@pytest.mark.parametrize("form", ["adapter", "cat", "factors"])
def test_an_adapter_is_one_file_as_peft_expects(base, three, tmp_path, form):
    paths, _ = three
    options = {"method": "linear"} if form == "cat" else {}
    merge(paths, tmp_path / "out", form=form, shard_bytes=1000, **options, **bounded(form))
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == [
        "adapter_model.safetensors"
    ]
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "out")


def adapter_of(path, tensors, like):
    """An adapter with the config of another."""
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text((like / "adapter_config.json").read_text())
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_of_16_bits_are_read_and_written(base, three, tmp_path, dtype):
    paths, _ = three
    kind = getattr(torch, dtype)
    halved, wide = [], []
    for path in paths:
        rounded = {n: t.to(kind) for n, t in load_file(path / "adapter_model.safetensors").items()}
        halved.append(adapter_of(tmp_path / f"half-{path.name}", rounded, path))
        widened = {name: tensor.float() for name, tensor in rounded.items()}
        wide.append(adapter_of(tmp_path / f"wide-{path.name}", widened, path))
    for form, method in (("dense", "ties"), ("adapter", "ties"), ("cat", "linear")):
        options = {"form": form, "method": method} | on(form, base) | bounded(form)
        merge(halved, tmp_path / f"{form}-half", **options)
        merge(wide, tmp_path / f"{form}-wide", **options)
        assert_same(load(tmp_path / f"{form}-half"), load(tmp_path / f"{form}-wide"))
    merge(wide, tmp_path / "written", form="adapter", max_lost=1, dtype=dtype)
    written, full = load(tmp_path / "written"), load(tmp_path / "adapter-wide")
    assert_same(written, {name: tensor.to(kind) for name, tensor in full.items()})


def test_factors_that_do_not_fit_their_type_are_refused(tmp_path):
    large = {"layer": (torch.full((1, 4), 1e6), torch.full((3, 1), 1e6))}
    paths = [handmade(tmp_path / name, large) for name in "ab"]
    for form, method in (("adapter", "ties"), ("cat", "linear"), ("factors", "ties")):
        options = {"form": form, "method": method, "rank": 1 if form == "adapter" else None}
        refused(paths, tmp_path / "out", "layer", "F16", dtype="float16", **options)
        merge(paths, tmp_path / form, dtype="bfloat16", **options)


# -- side by side ----------------------------------------------------------------------------------


def test_cat_is_the_exact_mean_at_the_sum_of_the_ranks(base, three, tmp_path):
    paths, deltas = three
    report = merge(paths, tmp_path / "out", form="cat", method="linear")
    assert report.manifest["settings"]["rank"] == 12
    assert {lines["energy_lost"] for lines in report.manifest["tensors"].values()} == {0.0}
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "out")
    found = changes(model)
    assert set(found) == set(deltas[0])
    for module, change in found.items():
        wanted = sum(delta[module] for delta in deltas) / 3
        torch.testing.assert_close(change, wanted, rtol=0, atol=1e-6)


def test_cat_takes_weights_of_a_mean_or_of_a_sum(three, tmp_path):
    paths, deltas = three
    merge(paths, tmp_path / "mean", form="cat", method="linear", weights=[1, 2, 5])
    options = {"method": "task-arithmetic", "weights": [1, 2, 5], "lam": 0.5}
    merge(paths, tmp_path / "sum", form="cat", **options)
    mean, total = products(tmp_path / "mean"), products(tmp_path / "sum")
    for module in deltas[0]:
        wanted = deltas[0][module] + 2 * deltas[1][module] + 5 * deltas[2][module]
        torch.testing.assert_close(mean[module].float(), wanted / 8, rtol=0, atol=1e-6)
        torch.testing.assert_close(total[module].float(), wanted / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 11, 12, 40])
def test_cat_cut_to_a_rank_is_the_best_of_that_rank(three, tmp_path, rank):
    paths, deltas = three
    report = merge(paths, tmp_path / "out", form="cat", method="linear", rank=rank, max_lost=1)
    found = products(tmp_path / "out")
    for module in deltas[0]:
        wanted = sum(delta[module].double() for delta in deltas) / 3
        left, values, right = torch.linalg.svd(wanted, full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        norm = wanted.norm()
        assert float((wanted - found[module]).norm() / norm) == pytest.approx(
            float((wanted - best).norm() / norm), abs=1e-4
        )
        lines = report.manifest["tensors"][f"{PREFIX}{module}.lora_A.weight"]
        assert lines["energy_lost"] == pytest.approx(loss(wanted, best), abs=1e-5)


def test_cat_of_different_ranks_is_exact(base, three, tmp_path):
    paths, deltas = three
    scales = {"lora_alpha": 5, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"k_proj": 9}}
    odd = train(base, tmp_path / "odd", 7, r=3, use_rslora=True, **scales)
    report = merge([*paths, tmp_path / "odd"], tmp_path / "out", form="cat", method="linear")
    assert report.manifest["settings"]["rank"] == 18
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "out")
    for module, change in changes(model).items():
        wanted = (sum(delta[module] for delta in deltas) + odd[module]) / 4
        torch.testing.assert_close(change, wanted, rtol=0, atol=1e-6)
    # as many as fit the smaller side of k_proj, 16: nothing may be lost where the rank is enough
    assert max(lines["energy_lost"] for lines in report.manifest["tensors"].values()) < 1e-6


def test_cat_that_loses_too_much_is_refused(three, tmp_path):
    paths, _ = three
    options = {"form": "cat", "method": "linear", "rank": 1}
    refused(paths, tmp_path / "out", "module 'model.layers.", "rank 1 loses", **options)


# -- as PEFT does it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "density"), [([1.0] * 3, 0.8), ([1.0] * 3, 0.35), ([0.5, 2.0, 1.0], 0.8)]
)
@pytest.mark.parametrize("alphas", [(8, 8, 8), (8, 3, 16)])
def test_factors_are_those_of_peft(base, tmp_path, weights, density, alphas):
    paths = [tmp_path / f"adapter-{k}" for k in range(3)]
    for k, path in enumerate(paths):
        train(base, path, 10 + k, lora_alpha=alphas[k])
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), paths[0], "a0")
    model.load_adapter(paths[1], "a1")
    model.load_adapter(paths[2], "a2")
    names = ["a0", "a1", "a2"]
    model.add_weighted_adapter(names, weights, "merged", combination_type="ties", density=density)
    model.save_pretrained(tmp_path / "peft", selected_adapters=["merged"])
    theirs = load(tmp_path / "peft" / "merged")
    merge(paths, tmp_path / "ours", form="factors", weights=weights, density=density)
    ours = load(tmp_path / "ours")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ulps(ours[name], tensor) <= 1, name
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "ours")
    for module, change in changes(model, "merged").items():
        torch.testing.assert_close(changes(loaded)[module], change, rtol=0, atol=1e-6)


def ulps(one, other):
    """The largest distance in units of the last place."""
    one, other = one.numpy(), other.numpy()
    scale = np.spacing(np.maximum(np.abs(one), np.abs(other)))
    return float((np.abs(one - other) / scale).max())


# -- the result does not depend on ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "method"),
    [
        ("dense", "ties"),
        ("dense", "dare-ties"),
        ("adapter", "ties"),
        ("cat", "linear"),
        ("factors", "ties"),
    ],
)
def test_threads_and_engine_change_no_bit_of_adapters(base, three, tmp_path, form, method):
    paths, _ = three
    outs = []
    for engine, threads in (("numba", 1), ("numba", 2), ("numba", 4), ("numpy", 1)):
        outs.append(tmp_path / f"{engine}-{threads}")
        options = {"engine": engine, "threads": threads} | on(form, base) | bounded(form)
        merge(paths, outs[-1], form=form, method=method, **options)
    for out in outs[1:]:
        assert weight_bytes(out) == weight_bytes(outs[0])


def test_thresholds_are_kept_of_full_checkpoints_only(base, three, tmp_path):
    for form in ("dense", "adapter"):
        options = {"form": form, "keep_thresholds": True} | on(form, base)
        refused(three[0], tmp_path / "out", "ties of full models only", **options)


def test_the_manifest_names_the_adapters(base, three, tmp_path):
    paths, _ = three
    report = merge(paths, tmp_path / "out", base=base)
    lines = report.manifest["checkpoints"]
    assert [line["path"] for line in lines] == [str(path) for path in paths]
    sizes = [(path / "adapter_model.safetensors").stat().st_size for path in paths]
    assert [line["bytes"] for line in lines] == sizes
    assert report.manifest["base"]["path"] == str(base)
    assert len({line["fingerprint"] for line in lines}) == 3


@pytest.mark.parametrize("form", ["dense", "adapter", "factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_reads_each_input_once(tmp_path, form, dtype):
    pairs = {"layer": tuple(t.to(dtype) for t in noise(0, (2, 6), (5, 2)))}
    paths = [handmade(tmp_path / str(k), pairs) for k in range(2)]
    origin = save(tmp_path / "base", {"layer.weight": torch.ones(5, 6), "other": torch.ones(3)})
    plan = merge(paths, tmp_path / "out", form=form, dry_run=True, **on(form, origin)).plan
    factors = 2 * (2 * 6 + 5 * 2) * dtype.itemsize
    assert plan.read_bytes == factors + (4 * (30 + 3) if form == "dense" else 0)


def peak(paths, out, **options):
    """(bytes that the merge has allocated at once, the bound of its plan)."""
    tracemalloc.start()
    try:
        report = merge(paths, out, threads=1, **options)
        return tracemalloc.get_traced_memory()[1], report.plan.memory_bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("form", "size", "rank", "count"), [("dense", 1500, 384, 8), ("adapter", 4500, 8, 2)]
)
def test_a_merge_of_large_layers_stays_below_the_bound_of_its_plan(
    tmp_path, form, size, rank, count
):
    for name, side in (("tiny", 8), ("large", size)):  # the first loads the compiled code
        pair = noise(0, (rank, side), (side, rank))
        paths = [handmade(tmp_path / name / str(k), {"layer": pair}) for k in range(count)]
        options = {"form": form} | bounded(form)
        if form == "dense":
            weight = {"layer.weight": torch.ones(side, side)}
            options["base"] = save(tmp_path / f"base-{name}", weight)
        most, bound = peak(paths, tmp_path / f"out-{name}", **options)
    assert most <= bound


@pytest.mark.parametrize(("form", "method"), [("adapter", "ties"), ("cat", "linear")])
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, form, method):
    most = {}
    for layers in (1, 2, 40):
        pairs = {f"layers.{k}": noise(k, (8, 16), (2000, 8)) for k in range(layers)}
        paths = [handmade(tmp_path / f"{layers}-{k}", pairs) for k in range(2)]
        options = {"form": form, "method": method, "max_lost": 1}
        most[layers], _ = peak(paths, tmp_path / f"out-{layers}", **options)
    assert most[40] < most[2] + (1 << 20)  # the factors of 40 layers have 10 MiB


# -- adapters that cannot be merged --------------------------------------------------------------

KINDS = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "a bias": ({"bias": "lora_only"}, "bias"),
    "a bias of B": ({"lora_bias": True}, "lora_bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "activated LoRA": (
        {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [1, 2]},
        "alora_invocation_tokens",
    ),
}


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_whose_change_is_more_than_a_product_is_refused(base, tmp_path, what):
    config, name = KINDS[what]
    odd = base
    if what == "a bias":
        odd = llama(tmp_path / "base", attention_bias=True)
    paths = [tmp_path / "one", tmp_path / "two"]
    for seed, path in enumerate(paths):
        train(odd, path, seed, **config)
    refused(paths, tmp_path / "out", paths[0], name, base=odd)


def test_another_kind_of_adapter_is_refused(base, three, tmp_path):
    config = LoHaConfig(r=2, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(
        tmp_path / "loha"
    )
    paths, _ = three
    refused([paths[0], tmp_path / "loha"], tmp_path / "out", tmp_path / "loha", "LOHA", base=base)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": ["layer"]}),
        ("monteclora_config", {"num_samples": 8}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)
def test_a_setting_that_changes_more_is_refused_by_name(tmp_path, key, value):
    pairs = {"layer": noise(0, (2, 6), (5, 2))}
    paths = [handmade(tmp_path / "one", pairs), handmade(tmp_path / "two", pairs, **{key: value})]
    refused(paths, tmp_path / "out", tmp_path / "two", key, form="adapter")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"peft_type": "LORA", "lora_alpha": "eight"}',
        '{"peft_type": "LORA", "lora_alpha": null}',
        '{"peft_type": "LORA", "alpha_pattern": ["layer"]}',
        '{"peft_type": "LORA", "alpha_pattern": {"layer(": 4}}',
        '{"peft_type": "LORA", "alpha_pattern": {"layer": "four"}}',
        '{"peft_type": "LORA", "base_model_name_or_path": "base", "alpha_pattern": {"layer": NaN}}',
        '{"peft_type": "LORA", "base_model_name_or_path": "base", "lora_alpha": 1e999}',
    ],
)
def test_a_damaged_config_is_refused(tmp_path, text):
    pairs = {"layer": noise(0, (2, 6), (5, 2))}
    paths = [handmade(tmp_path / name, pairs) for name in ("one", "two")]
    (paths[1] / "adapter_config.json").write_text(text)
    refused(paths, tmp_path / "out", paths[1], form="adapter")
    refused(paths, tmp_path / "out", paths[1], form="cat", method="linear")


def test_an_adapter_without_its_weights_is_refused(three, tmp_path):
    paths, _ = three
    (tmp_path / "bare").mkdir()
    config = (paths[0] / "adapter_config.json").read_text()
    (tmp_path / "bare" / "adapter_config.json").write_text(config)
    refused([*paths, tmp_path / "bare"], tmp_path / "out", tmp_path / "bare", form="adapter")


def test_a_refused_adapter_is_closed(tmp_path):
    odd = handmade(tmp_path / "odd", {"layer": (torch.ones(2, 6), torch.ones(5, 3))})
    before = len(os.listdir("/proc/self/fd"))
    refused([odd, odd], tmp_path / "out", "no matching", form="adapter")
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_adapter_without_its_folder_is_refused(three, tmp_path):
    paths, _ = three
    files = [path / "adapter_model.safetensors" for path in paths]
    refused(files, tmp_path / "out", files[0], "lora_A", "folders", method="linear")


def test_adapters_as_a_run_resumes_from_them_are_refused(tmp_path):
    """Named as in memory, with the adapter's name."""
    a, b = noise(0, (2, 6), (5, 2))
    tensors = {f"{PREFIX}x.lora_A.default.weight": a, f"{PREFIX}x.lora_B.default.weight": b}
    files = [save(tmp_path / f"{k}.safetensors", tensors) for k in range(2)]
    refused(files, tmp_path / "out", files[0], "lora_A.default", "folders", method="linear")


def test_a_full_model_may_have_layers_that_are_named_as_factors(tmp_path):
    """As Phi-4-multimodal has."""
    names = ("x.base_layer.weight", "x.lora_A.vision.weight", "x.lora_B.vision.weight")
    files = [
        save(tmp_path / f"{k}.safetensors", {name: noise(k, (2, 2))[0] for name in names})
        for k in range(2)
    ]
    merge(files, tmp_path / "out", method="linear")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert set(merged) == set(names)
    mean = (noise(0, (2, 2))[0] + noise(1, (2, 2))[0]) / 2
    torch.testing.assert_close(merged[names[1]], mean)


def test_adapters_of_different_modules_are_refused(base, three, tmp_path):
    paths, _ = three
    train(base, tmp_path / "fewer", 5, target_modules=["q_proj", "k_proj"])
    missing = "model.layers.0.mlp.down_proj"
    for given in ([*paths, tmp_path / "fewer"], [tmp_path / "fewer", *paths]):
        refused(given, tmp_path / "out", missing, f"{tmp_path / 'fewer'} has no", base=base)


def test_adapters_of_different_bases_are_refused(tmp_path):
    pairs = {"layer": noise(0, (2, 6), (5, 2))}
    one = handmade(tmp_path / "one", pairs)
    other = handmade(tmp_path / "other", pairs, base_model_name_or_path="elsewhere")
    refused([one, other], tmp_path / "out", "'base'", "'elsewhere'", one, other, form="adapter")


def test_adapters_of_different_shapes_are_refused(tmp_path):
    one = handmade(tmp_path / "one", {"layer": noise(0, (2, 6), (5, 2))})
    for name, shapes in {"wide": ((2, 7), (5, 2)), "tall": ((2, 6), (4, 2))}.items():
        other = handmade(tmp_path / name, {"layer": noise(0, *shapes)})
        refused([one, other], tmp_path / "out", "'layer'", "(5, 6)", other, form="adapter")


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 6), (5, 3)), ((2, 6), None), (None, (5, 2)), ((2, 6, 1), (5, 2)), ((12,), (5, 2))],
)
def test_factors_that_do_not_belong_together_are_refused(tmp_path, a, b):
    one = handmade(tmp_path / "one", {"layer": noise(0, (2, 6), (5, 2))})
    shapes = {"lora_A": a, "lora_B": b}
    tensors = {f"{PREFIX}layer.{n}.weight": torch.ones(s) for n, s in shapes.items() if s}
    save_file(tensors, one / "adapter_model.safetensors")
    other = handmade(tmp_path / "other", {"layer": noise(0, (2, 6), (5, 2))})
    refused([one, other], tmp_path / "out", one, "layer", form="adapter")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("form", "method", "rank"),
    [
        ("dense", "ties", None),
        ("adapter", "ties", None),
        ("cat", "linear", None),
        ("cat", "linear", 3),
        ("factors", "ties", None),
    ],
)
def test_a_factor_that_is_not_finite_is_named(tmp_path, form, method, rank, side, value):
    pairs = [noise(k, (2, 6), (5, 2)) for k in range(2)]
    pairs[1][side][1, 1] = value
    paths = [handmade(tmp_path / str(k), {"deep.layer": pair}) for k, pair in enumerate(pairs)]
    origin = save(tmp_path / "base", {"deep.layer.weight": torch.ones(5, 6)})
    options = {"form": form, "method": method, "rank": rank} | on(form, origin) | bounded(form)
    refused(paths, tmp_path / "out", "'deep.layer'", "not finite", paths[1], **options)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"form": "dense"}, ["give the base"]),
        ({"form": "sparse"}, ["'sparse'", "dense, adapter, cat, factors"]),
        ({"form": "adapter", "rank": 0}, ["rank 0"]),
        ({"form": "adapter", "rank": -2}, ["rank -2"]),
        ({"form": "factors", "rank": 4}, ["rank 4", "no rank"]),
        ({"form": "cat", "method": "ties"}, ["cat", "linear merges only", "ties"]),
        ({"form": "cat", "method": "dare-linear"}, ["cat", "dare-linear"]),
        ({"form": "cat", "method": "dare-ties"}, ["cat", "dare-ties"]),
        ({"form": "cat", "method": "linear", "lam": 2.0}, ["linear has no lambda"]),
        ({"form": "factors", "method": "linear"}, ["factors", "ties"]),
        ({"form": "factors", "lam": 2.0}, ["factors", "lambda"]),
        ({"form": "adapter", "method": "slerp", "count": 2}, ["slerp is for full checkpoints"]),
        ({"form": "adapter", "count": 1}, ["given 1"]),
    ],
)
def test_a_form_that_cannot_be_made_is_refused(three, tmp_path, options, parts):
    options = dict(options)
    paths = three[0][: options.pop("count", 3)]
    refused(paths, tmp_path / "out", *parts, **options)


@pytest.mark.parametrize(
    ("form", "method"), [("adapter", "ties"), ("cat", "linear"), ("factors", "ties")]
)
def test_an_adapter_is_merged_without_a_base(base, three, tmp_path, form, method):
    """The manifest would name a base that nothing was read of."""
    told = f"form {form} makes an adapter and needs no base"
    refused(three[0], tmp_path / "out", told, base=base, form=form, method=method)


def test_dense_takes_no_rank(base, three, tmp_path):
    refused(three[0], tmp_path / "out", "rank 4", "no rank", base=base, rank=4)


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_what_loses_nothing_takes_no_bound_on_the_loss(base, three, tmp_path, form):
    refused(three[0], tmp_path / "out", "no max_lost", base=base, form=form, max_lost=0.5)


def test_factors_of_different_ranks_are_refused(base, three, tmp_path):
    train(base, tmp_path / "odd", 5, r=6)
    paths = [*three[0], tmp_path / "odd"]
    refused(paths, tmp_path / "out", "equal ranks", "[4, 6]", form="factors")


# -- names in the base -----------------------------------------------------------------------------


def test_an_adapter_of_a_model_whose_files_name_it_otherwise_merges(tiny25, tmp_path):
    paths, deltas = [tmp_path / "a0", tmp_path / "a1"], []
    for seed, path in enumerate(paths):
        model = AutoModelForImageTextToText.from_pretrained(tiny25)
        config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)")
        model = adapted(model, config, seed)
        model.save_pretrained(path)
        deltas.append(changes(model))
    merge(paths, tmp_path / "out", base=tiny25)
    before, found = load(tiny25), load(tmp_path / "out")
    assert set(found) == set(before)
    assert "model.layers.0.self_attn.q_proj.weight" in before
    assert "model.language_model.layers.0.self_attn.q_proj" in deltas[0]
    merged = merged_changes(deltas)
    state = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    origin = AutoModelForImageTextToText.from_pretrained(tiny25).state_dict()
    for name, tensor in origin.items():
        change = merged.pop(name.removesuffix(".weight"), None)
        if change is None:
            assert torch.equal(state[name], tensor), name
        else:
            torch.testing.assert_close(state[name], tensor + change, rtol=0, atol=1e-6)
    assert merged == {}


def layer_of(path, module, seed=0):
    return handmade(path, {module: noise(seed, (2, 6), (6, 2))})


@pytest.mark.parametrize(
    ("module", "names", "wanted"),
    [
        ("model.layers.0.q_proj", ["model.layers.0.q_proj", "model.layers.1.q_proj"], 0),
        ("model.language.layers.1.q_proj", ["model.layers.0.q_proj", "model.layers.1.q_proj"], 1),
        ("layers.1.q_proj", ["model.text.layers.1.q_proj", "model.text.layers.11.q_proj"], 0),
        ("model.layers.1.q_proj", ["visual.layers.1.q_proj", "model.layers.1.q_proj"], 1),
        ("text.layers.1.q_proj", ["visual.layers.1.q_proj", "model.layers.1.q_proj"], 1),
        (
            "model.language_model.layers.1.q_proj",
            ["vision_tower.encoder.layers.1.q_proj", "language_model.model.layers.1.q_proj"],
            1,
        ),
        (
            "model.vision_tower.layers.1.q_proj",
            ["vision_tower.encoder.layers.1.q_proj", "language_model.model.layers.1.q_proj"],
            0,
        ),
        # not one that clearly is the weight
        ("model.layers.2.q_proj", ["model.layers.0.q_proj", "model.layers.1.q_proj"], None),
        ("model.layers.1.q_proj", ["model.layers.0.q_proj"], None),
        ("model.layers.1.q_proj", ["model.layers.11.q_proj"], None),
        ("text.layers.1.q_proj", ["model.a.layers.1.q_proj", "model.b.layers.1.q_proj"], None),
        ("lm_head", ["model.embed_tokens"], None),
    ],
)
def test_the_weight_of_a_module_is_found_by_its_name(tmp_path, module, names, wanted):
    paths = [layer_of(tmp_path / str(k), module, k) for k in range(2)]
    origin = save(tmp_path / "base", {f"{name}.weight": torch.ones(6, 6) for name in names})
    if wanted is None:
        several = [f"{name}.weight" for name in names if "model.b" in names[-1]]
        refused(paths, tmp_path / "out", repr(module), origin, *several, base=origin)
        return
    merge(paths, tmp_path / "out", base=origin)
    moved = [name for name, tensor in load(tmp_path / "out").items() if (tensor != 1).any()]
    assert moved == [f"{names[wanted]}.weight"]


def test_a_base_of_another_shape_is_refused(tmp_path):
    paths = [layer_of(tmp_path / str(k), "layer", k) for k in range(2)]
    origin = save(tmp_path / "base", {"layer.weight": torch.ones(6, 7)})
    refused(paths, tmp_path / "out", "'layer'", "(6, 6)", "(6, 7)", origin, base=origin)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("steps", torch.int64, "I64"),
        ("layer.weight", torch.float64, "F64"),
        ("layer.weight", torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_numbers_of_another_type_in_the_base_are_refused(tmp_path, name, kind, told, dtype):
    """Also those that an adapter changes, whose bytes were once read as float32."""
    paths = [layer_of(tmp_path / str(k), "layer", k) for k in range(2)]
    tensors = {"layer.weight": torch.ones(6, 6), "steps": torch.ones(2)}
    origin = save(tmp_path / "base", tensors | {name: tensors[name].to(kind)})
    refused(paths, tmp_path / "out", f"'{name}' is {told}; only", base=origin, dtype=dtype)


@pytest.mark.parametrize("form", ["dense", "adapter", "factors"])
def test_factors_of_another_type_are_refused(base, tmp_path, form):
    pair = tuple(side.double() for side in noise(0, (2, 6), (5, 2)))
    paths = [handmade(tmp_path / str(k), {"layer": pair}) for k in range(2)]
    refused(paths, tmp_path / "out", "lora_A", "is F64; only", form=form, **on(form, base))


def test_two_modules_are_not_merged_into_one_weight(tmp_path):
    pairs = {"left.layer": noise(0, (2, 6), (6, 2)), "right.layer": noise(1, (2, 6), (6, 2))}
    paths = [handmade(tmp_path / str(k), pairs) for k in range(2)]
    origin = save(tmp_path / "base", {"layer.weight": torch.ones(6, 6)})
    refused(paths, tmp_path / "out", paths[0], origin, base=origin)


def test_a_base_given_as_a_file_is_the_same_base(base, three, tmp_path):
    paths, _ = three
    merge(paths, tmp_path / "folder", base=str(base))
    merge(paths, tmp_path / "file", base=f"{base}/model.safetensors")
    assert weight_bytes(tmp_path / "folder") == weight_bytes(tmp_path / "file")
    # what lies beside a file may be anything; of the adapters nothing belongs to full weights
    names = {file.name for file in (tmp_path / "file").iterdir()}
    assert names == {"model.safetensors", "merged-from.json"}
