"""The command line. Heavy imports happen inside the commands: ``--help`` answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from holdfast import __version__
from holdfast.errors import DataError, HoldfastError, RecipeError
from holdfast.recipe import SHIPPED, load_recipe, shipped_recipes

app = typer.Typer(
    name="holdfast",
    help="Train one policy on several objectives, without losing any of them.",
    epilog="Start here:  holdfast train quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Replace an entry; may be repeated."),
]
RunsArgument = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Run directories, such as runs/quickstart.")
]


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"holdfast {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that come before a command."""


@app.command(
    epilog="Example:  holdfast check my.yaml --set schedule.evaluate_every=5",
)
def check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Validate a recipe without loading anything, and print what it resolves to."""
    import yaml

    loaded = load_recipe(recipe, set_ or ())
    text = yaml.safe_dump(loaded.dump(), sort_keys=False, allow_unicode=True)
    _say(text.rstrip())
    _say(f"# {recipe} is valid")


@app.command(
    epilog="Examples:  holdfast train quickstart   |   "
    "holdfast train my.yaml --set training.seed=1 --output runs/seed1   |   "
    "accelerate launch --multi_gpu --num_processes 2 -m holdfast train my.yaml",
)
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: Annotated[
        str | None, typer.Option(help="The run directory; the same as --set output=DIR.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that is already there.")] = False,
) -> None:
    """Train a recipe, and write its report."""
    overrides = list(set_ or ())
    if output is not None:
        overrides.append(f"output={json.dumps(output)}")  # a folder named 1 is text, too
    loaded = load_recipe(recipe, overrides)

    from holdfast.run import train as train_recipe

    _finish(train_recipe(loaded, overwrite=overwrite, console=console))


@app.command(epilog="Example:  holdfast resume runs/quickstart")
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of an unfinished run.")],
) -> None:
    """Continue a run that was stopped or killed, exactly as if it had never been."""
    from holdfast.run import resume as resume_run

    _finish(resume_run(run, console=console))


@app.command(epilog="Example:  holdfast optimum quickstart")
def optimum(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Find each objective's optimum by training on it alone. Values are kept for later runs."""
    loaded = load_recipe(recipe, set_ or ())

    from holdfast.run import find_optima

    table = Table("objective", "optimum", title=f"optima of {loaded.name}")
    for name, value in find_optima(loaded, console=console).items():
        table.add_row(name, f"{value:.6g}")
    console.print(table)


@app.command(
    epilog="Examples:  holdfast stability bellman-bus   |   "
    "holdfast stability my.yaml --rows 32 --sizes 3",
)
def stability(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: Annotated[
        str | None, typer.Option(help="The folder; by default the recipe's run directory.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Observations to replace; by default 500 of a table, else 16."),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(min=1, help="Replacements of each; by default 4 of a table, else 1."),
    ] = None,
    sizes: Annotated[
        int | None,
        typer.Option(
            min=0, help="Sizes of parts of the data to measure on; by default 4 of a table, else 0."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of rows and replacements.")] = 0,
) -> None:
    """Measure how far values or rewards would move, had one observation been another."""
    overrides = list(set_ or ())
    if output is not None:
        overrides.append(f"output={json.dumps(output)}")
    loaded = load_recipe(recipe, overrides)

    from holdfast.report import stability_tables, write_stability
    from holdfast.run import measure_stability

    folder = measure_stability(
        loaded, rows=rows, draws=draws, sizes=sizes, seed=seed, console=console
    )
    for table in stability_tables(folder):
        console.print(table)
    _say(f"result: {folder / 'stability.json'}")
    _say(f"report: {write_stability(folder)}")


@app.command(epilog="Example:  holdfast report runs/quickstart --output quickstart.html")
def report(
    runs: RunsArgument,
    output: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in the (first) run.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several."""
    from holdfast.report import write_report

    _say(f"report: {write_report(runs, output)}")


@app.command(epilog="Example:  holdfast compare runs/mix runs/alright runs/maxright")
def compare(
    runs: RunsArgument,
    output: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
) -> None:
    """Overlay runs: a table here, curves in one HTML page."""
    from holdfast.report import comparison_table, write_comparison

    console.print(comparison_table(runs))
    _say(f"comparison: {write_comparison(runs, output)}")


@app.command("list", epilog="Example:  holdfast list")
def list_() -> None:
    """Show the recipes that there are, and the kinds of every part of one."""
    import yaml

    from holdfast import schema
    from holdfast.joint.combine import METHODS

    recipes = Table("recipe", "what it shows", title=f"shipped recipes ({SHIPPED.name}/)")
    for name, path in shipped_recipes().items():
        described = yaml.safe_load(path.read_text("utf-8")).get("description", "")
        recipes.add_row(name, escape(described))
    console.print(recipes)
    kinds = Table("part", "kind", "what it is")
    for part, known in (
        (
            "policy",
            (
                schema.LanguagePolicySpec,
                schema.GaussianSpec,
                schema.DiffusionSpec,
                schema.ResidualSpec,
                schema.SavedSpec,
                schema.SoftQSpec,
            ),
        ),
        ("objective", schema.kinds(schema.AnyObjective)),
        ("schedule", schema.kinds(schema.AnySchedule)),
        ("guard", schema.kinds(schema.AnyGuard)),
        ("kl_control", schema.kinds(schema.KlControl)),
        ("covariance", schema.kinds(schema.Covariance)),
        ("imitation", schema.kinds(schema.ImitationSpec)),
    ):
        for spec in known:
            kinds.add_row(part, ", ".join(schema.names_of(spec)), escape(spec.__doc__ or ""))
    kinds.add_row("combiner", ", ".join(METHODS), escape(schema.CombinerSpec.__doc__ or ""))
    console.print(kinds)


demos = typer.Typer(
    name="demos",
    help="Record demonstrations for a control policy, and look at them.",
    no_args_is_help=True,
)
app.add_typer(demos)


@demos.command(
    "record",
    epilog="Examples:  holdfast demos record metaworld/peg-insert-side demos/peg.npz   |   "
    "holdfast demos record Hopper-v5 demos/hopper.npz --controller mine.py:act --keep-failures",
)
def demos_record(
    environment: Annotated[
        str,
        typer.Argument(
            metavar="ENVIRONMENT",
            help="holdfast/point-mass, metaworld/<task>, robosuite/<task>, or a Gymnasium id.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="FILE", help="A .npz or .hdf5 file to write.")],
    controller: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="A function of your own; by default the task's scripted expert.",
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A policy that a run wrote, such as runs/bc/model."),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes to keep.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the episodes.")] = 0,
    noise: Annotated[
        float,
        typer.Option(min=0.0, max=1e6, help="Deviation of Gaussian noise on executed actions."),
    ] = 0.0,
    intended: Annotated[
        bool, typer.Option(help="Store the intended action in place of the noisy one.")
    ] = False,
    keep_failures: Annotated[
        bool, typer.Option(help="Keep episodes without success as well.")
    ] = False,
    attempts: Annotated[
        int | None, typer.Option(min=1, help="Episodes to try; by default ten times --episodes.")
    ] = None,
    sparse: Annotated[
        bool | None,
        typer.Option(
            "--sparse/--dense",
            help="End episodes at success, with reward 1; by default, unless it is a controller's.",
        ),
    ] = None,
    time_limit: Annotated[
        int | None, typer.Option(min=1, help="Steps of an episode; by default the task's own.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Environments side by side.")] = 8,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that is already there.")] = False,
) -> None:
    """Record episodes of a scripted expert, a trained policy, or a controller of your own."""
    if controller and policy:
        raise RecipeError("--controller and --policy: name one of them, not both")
    if output.exists() and not overwrite:
        raise DataError(f"{output} is already there: name another file, or add --overwrite")

    from holdfast.control import demonstrations as recorded
    from holdfast.control.environments import (
        EnvironmentOptions,
        make_environments,
        scripted_expert,
    )

    recorded.check_name(output)  # before anything is recorded
    history = 1
    if policy is not None:
        from holdfast.control.acting import acting
        from holdfast.control.policies import load_policy

        trained = load_policy(policy)
        act, history = acting(trained, seed=seed), trained.history
    else:
        act = recorded.load_controller(controller) if controller else scripted_expert(environment)
    options = EnvironmentOptions(
        history=history,
        sparse=controller is None if sparse is None else sparse,
        time_limit=time_limit,
    )
    environments = make_environments(environment, min(count, episodes), options=options)
    if policy is not None:
        own = (trained.observation_size, trained.action_size)
        if own != (here := (environments.observation_size, environments.action_size)):
            raise RecipeError(
                f"--policy {policy} sees {own[0]} numbers in an observation and makes {own[1]} in "
                f"an action, but {environment} has {here[0]} and {here[1]}: it was trained in "
                "another environment"
            )
    found = recorded.record(
        act,
        environments,
        episodes,
        seed=seed,
        noise=noise,
        intended=intended,
        keep_failures=keep_failures,
        attempts=attempts,
    )
    recorded.write_demonstrations(found, output)
    _say(
        f"demonstrations: {output}: {len(found)} episodes, {found.steps} steps, "
        f"of {found.details['attempts']} attempts"
    )


@demos.command(
    "inspect", epilog="Example:  holdfast demos inspect demos/peg.npz --sheet demos/peg.png"
)
def demos_inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A .npz or .hdf5 file, or a folder in Minari or LeRobot v3 form."
        ),
    ],
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a contact sheet, such as sheet.png.")
    ] = None,
    environment: Annotated[
        str | None, typer.Option(help="Check the demonstrations against this environment.")
    ] = None,
) -> None:
    """Summarise demonstrations: episodes, success, returns and ranges."""
    from dataclasses import replace

    from holdfast.control import demonstrations as recorded

    found = recorded.read_demonstrations(file)
    if environment is None:
        recorded.validate(found, allow_cut=True)
    else:
        from holdfast.control.environments import make_environments

        recorded.validate(found, make_environments(environment, 1))
        found = replace(found, environment=environment)
    console.print(recorded.summary_tables(found))
    if environment is not None:
        _say(f"the demonstrations fit {environment}")
    if sheet is not None:
        from holdfast.control.watching import contact_sheet, replay, save_picture

        films = [replay(found, number) for number in range(min(len(found), 6))]
        save_picture(contact_sheet(films), sheet)
        drawn = {film.drawn for film in films if film.drawn}
        _say(f"contact sheet: {sheet}" + "".join(f" (paths only: {why})" for why in drawn))


def _finish(run: Path) -> None:
    """Tell how the run went; only the main process of several does."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    from holdfast.report import summary_table, write_report

    console.print(summary_table(run))
    _say(f"run: {run}")
    _say(f"report: {write_report([run])}")


def _say(text: str) -> None:
    """Print as it is: paths are not broken into lines, and brackets are no markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point: what a user can mend is one message and exit status 2, never a traceback."""
    try:
        app()
    except HoldfastError as error:
        message = Text.assemble(("error:", "bold red"), f" {error}")
        Console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
