"""For `make test-vllm`, in every process: lets PyPI's torchvision be imported beside the CPU build of torch.

Its compiled part does not load there, and without it two operators are missing that its import asks for; vLLM and
transformers want the import, nobody here the operators.
"""

import importlib.abc
import sys


class Declare(importlib.abc.MetaPathFinder):
    """Declares the operators just before torchvision is found."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor boxes, Tensor scores, float iou) -> Tensor")
            sys.modules[__name__].declared = self  # the declaration lasts as long as the library
        return None


sys.meta_path.insert(0, Declare())
