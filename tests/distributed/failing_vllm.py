"""`gtr-turbo` on two ranks with a vLLM server each; that of rank 1 dies whenever a reply is asked for.

python failing_vllm.py FOLDER train ...: FOLDER gets the server's program, and what each of the two saw.
"""

import json
import os
import sys
from pathlib import Path

from gtr_turbo.cli import main
from gtr_turbo.distributed.launch import leave

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
fake = Path(__file__).parent.parent / "policy" / "vllm_fake.py"
state, program = folder / f"{rank}.json", folder / f"python{rank}"
state.write_text(json.dumps({"deaths": 9 if rank == "1" else 0, "image": 5}))
program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake}" "{state}" "$@"\n')
program.chmod(0o755)
chosen = folder / "chosen"  # one setting for both ranks, as it must be
chosen.write_text('#!/bin/sh\nexec "$FAKE_VLLM" "$@"\n')
chosen.chmod(0o755)
os.environ["FAKE_VLLM"] = str(program)

leave(main([*sys.argv[2:], "--rollout.vllm.python", str(chosen)]))
