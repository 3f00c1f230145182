"""Saves the gradient of each objective of a recipe: ``gradients.py RECIPE OUT``, on any ranks."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from holdfast.assemble import accelerator_for, assemble, build_trainer
from holdfast.recipe import load_recipe


def main(recipe_path: str, out: str) -> None:
    recipe = load_recipe(recipe_path)
    folder = Path(out).parent
    accelerator = accelerator_for(recipe, folder)
    assembly = assemble(recipe, accelerator)
    trainer = build_trainer(recipe, assembly, {}, accelerator, folder=folder, recorder=None)
    saved = {}
    for name, objective in trainer.objectives.items():
        gradient, summary = trainer._gradient(objective, objective.source.next())
        for (key, _), part in zip(trainer._named, gradient, strict=True):
            if part is not None:
                saved[f"{name}/{key}"] = part.clone()
        saved["world"] = torch.tensor([accelerator.num_processes])
        saved[f"{name}/loss"] = torch.tensor([summary.loss, summary.count])
        evaluated = trainer.evaluate(objective, objective.held_out)
        saved[f"{name}/held_out"] = torch.tensor([evaluated.loss, evaluated.count])
    for _ in range(3):
        trainer.train_step()
    for key, parameter in trainer._named:
        saved[f"after/{key}"] = parameter.detach().clone()
    if accelerator.is_main_process:
        save_file(saved, out)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
