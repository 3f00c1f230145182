"""One trainer in a process of its own, stepped from outside.

``python -m benchmarks.cost.worker SIDE STAGES SETTING FOLDER``. Every line on standard input
lets the trainer take one optimiser step; every line on standard output is JSON: first what was
resident before and after set-up, then the time of each step, at last losses and peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost.material import SETTINGS, model_folder, recipe_values, rows_file


class Gate:
    """Lets one step through at a time, and reports how long it took."""

    def __init__(self) -> None:
        # Libraries print. What they print goes to standard error, the report elsewhere.
        self._report = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **values: Any) -> None:
        self._report.write(json.dumps(values) + "\n")
        self._report.flush()

    def open(self) -> None:
        sys.stdin.readline()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def close(self) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.say(wall=wall, cpu=cpu)


class InOrder:
    """Batches in the order of the file."""

    def __init__(self, rows: Sequence[Any], batch_size: int) -> None:
        self._rows = itertools.cycle(rows)
        self._batch_size = batch_size

    def next(self) -> list[Any]:
        return list(itertools.islice(self._rows, self._batch_size))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def holdfast(
    gate: Gate, stages: dict[str, int], setting: str, folder: Path
) -> Iterator[list[float]]:
    """Pauses after imports and after set-up; at last gives gradient norm and losses."""
    from holdfast.assemble import accelerator_for, assemble, build_trainer
    from holdfast.joint.batches import Batches
    from holdfast.joint.record import Recorder
    from holdfast.recipe import parse_recipe

    yield []
    run = folder / f"run-{os.getpid()}"
    run.mkdir()
    os.environ["HOLDFAST_CACHE"] = str(run)
    values = recipe_values(folder, setting, stages, race=True)
    recipe = parse_recipe(values, file=folder / "recipe.yaml")
    accelerator = accelerator_for(recipe, run)
    assembly = assemble(recipe, accelerator)
    for objective in assembly.objectives.values():
        shuffled = objective.source
        assert isinstance(shuffled, Batches)
        objective.source = InOrder(shuffled.rows, SETTINGS[setting].batch_size)
    recorder = Recorder(run)
    trainer = build_trainer(recipe, assembly, {}, accelerator, folder=run, recorder=recorder)
    yield []
    for _ in range(sum(stages.values())):
        gate.open()
        trainer.train_step()
        gate.close()
    recorder.close()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    yield [lines[0]["grad_norm"], *(next(iter(x["objectives"].values()))["loss"] for x in lines)]


def trl(
    gate: Gate, stages: dict[str, int], setting: str, folder: Path, precompute: bool
) -> Iterator[list[float]]:
    """As :func:`holdfast`, for one stage."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    yield []
    ((stage, steps),) = stages.items()
    losses: list[torch.Tensor] = []

    class Stepper(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gate.open()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gate.close()
            if state.global_step < steps:
                gate.open()

    kind, config = (SFTTrainer, SFTConfig) if stage == "sft" else (DPOTrainer, DPOConfig)

    class Observed(kind):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    chosen = SETTINGS[setting]
    options: dict[str, Any] = {"precompute_ref_log_probs": True} if precompute else {}
    where = str(model_folder(folder, setting))
    rows = load_dataset(
        "json",
        data_files=str(rows_file(folder, stage, setting)),
        split="train",
        cache_dir=str(folder / f"datasets-{os.getpid()}"),
    )
    trainer = Observed(
        model=AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32),
        # AutoTokenizer would put rules of the Qwen family in place of the saved ones.
        processing_class=PreTrainedTokenizerFast.from_pretrained(where),
        train_dataset=rows,
        callbacks=[Stepper()],
        args=config(
            output_dir=str(folder / f"trl-{os.getpid()}"),
            per_device_train_batch_size=chosen.batch_size,
            max_steps=steps,
            max_length=chosen.max_length,
            learning_rate=chosen.learning_rate,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            # Both of these would cost TRL time on a CPU.
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_first_step=True,
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
    )
    yield []
    trainer.train()
    norm = trainer.state.log_history[0]["grad_norm"]
    yield [float(norm), *(float(loss) for loss in losses)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["holdfast", "trl", "trl, precomputed"])
    parser.add_argument("stages", type=json.loads, help='such as {"sft": 40}')
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    gate = Gate()
    common = gate, args.stages, args.setting, args.folder
    side = (
        holdfast(*common)
        if args.side == "holdfast"
        else trl(*common, precompute="precomputed" in args.side)
    )
    next(side)
    imported, started = resident_bytes(), time.perf_counter()
    next(side)
    gate.say(imported=imported, ready=resident_bytes(), set_up=time.perf_counter() - started)
    norm, *losses = next(side)
    # Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gate.say(peak=peak, grad_norm=norm, losses=losses)


if __name__ == "__main__":
    main()
