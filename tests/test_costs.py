"""What a stage cost: nothing that is the process's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
from recbole_cl import run_recbole_cl
from recbole_cl.training.passes import StagePass

train, new = StagePass.train, []

def counted(self, *given):
    before = set(sys.modules)
    try:
        return train(self, *given)
    finally:
        new.append(len(set(sys.modules) - before))

StagePass.train = counted
run_recbole_cl("BPR", "shop", config_dict=json.loads(sys.argv[1]))
print(json.dumps(new))
"""


def test_the_first_stage_of_a_process_does_not_pay_its_imports(tmp_path: Path) -> None:
    """The first optimiser imported 800 modules inside the training seconds of stage 1."""
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [f"u{n % 6}\ti{(n * n + n // 6) % 10}\t{1000 + n}" for n in range(60)]
    (folder / "shop.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n")
    given = {"data_path": str(tmp_path), "output_dir": str(tmp_path / "run"), "n_stages": 2, "epochs": 1, "warmup": 2}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps({**given, "show_progress": False})],
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first < 20 and second == 0
