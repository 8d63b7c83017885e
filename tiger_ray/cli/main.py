"""`tiger-ray`: every verb of the command line. Heavy imports wait until a verb has work to do."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from tiger_ray.cli.flags import AllSettingsCommand, SettingsCommand
from tiger_ray.cli.job import open_night, open_storage, run_verb
from tiger_ray.errors import SettingsError

SETTINGS_HELP = (
    "Settings: --config FILE.yaml (may be repeated, later files win), --date DATE, and any --section.name value. "
    "tiger-ray run --help lists all settings."
)

EXIT_CODES = (
    "Exit codes: 0 done, 2 settings, 3 data or artifacts, 4 quality gate, 5 published already, 6 storage or cluster, "
    "7 commit unknown, 130 stopped. Each message says how to go on."
)

app = typer.Typer(
    name="tiger-ray",
    help="Nightly recommendations by generative retrieval on Ray: catalog and events in, a list for every user out.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
show = typer.Typer(
    help="Look at a user, an item or a night of what is published; starts no Ray.", no_args_is_help=True
)
storage = typer.Typer(
    help="List, verify or set back what is published; deletes nothing, starts no Ray.", no_args_is_help=True
)
app.add_typer(show, name="show")
app.add_typer(storage, name="storage")

Context = typer.Context
EPILOG = f"{SETTINGS_HELP}\n\n{EXIT_CODES}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        argv: words after the name of the program; None: the words of this process.
    """
    try:
        app(list(sys.argv[1:] if argv is None else argv), prog_name="tiger-ray")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _verb(
    group: typer.Typer, name: str | None = None, *, cls: type[TyperCommand] = TyperCommand, epilog: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function as a verb whose help is the docstring, each paragraph as one line that the terminal wraps."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        metavar = "[OPTIONS]" if cls is TyperCommand else "[OPTIONS] [SETTINGS]"
        group.command(name, cls=cls, help=text, epilog=epilog, options_metavar=metavar)(function)
        return function

    return add


def _end(act: Callable[[], int | None]) -> None:
    raise typer.Exit(run_verb(act))


@_verb(app, cls=AllSettingsCommand, epilog=EXIT_CODES)
def run(
    context: Context,
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE", help="Stages to run; their inputs must be published.", show_default="all"
        ),
    ] = None,
) -> None:
    """Run a night: catalog and events in, Semantic IDs, model, evaluation and one list per user out.

    Writes one artifact per stage below storage.root and publishes each for --date. No finished stage runs again: the
    same command continues where the last one ended.
    """

    def act() -> None:
        chosen = _require_stages(stages or [])
        settings, store = open_night(context.args)
        from tiger_ray.cli.night import run_and_show

        run_and_show(settings, store, *chosen)

    _end(act)


def _require_stages(stages: Sequence[str]) -> Sequence[str]:
    """Return the names if all are stages; else raise an error with the nearest stage."""
    if not stages:
        return stages
    from tiger_ray.artifacts.metadata import (
        MODELS,
    )  # the module of the stages imports Ray, which takes seconds

    for stage in stages:
        if stage not in MODELS:
            near = difflib.get_close_matches(stage, MODELS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise SettingsError(f"there is no stage {stage!r}{hint} Stages: {', '.join(MODELS)}")
    return stages


@_verb(app, cls=SettingsCommand, epilog=EPILOG)
def plan(context: Context) -> None:
    """Say what a night would do: for each stage, computes, reuses or skips, and which setting, input or format differs.

    Shows rows and bytes in, and seconds and memory of the last run. Writes nothing and starts no Ray. The exit code is
    that of the error with which the night would end, as far as a plan can know.
    """

    def act() -> None:
        settings, store = open_storage(context.args, defaults={})
        from tiger_ray.cli.plan import show_plan

        show_plan(settings, store)

    _end(act)


@_verb(app, cls=SettingsCommand, epilog=EPILOG)
def check(
    context: Context,
    data: Annotated[
        bool, typer.Option("--data", help="Also read the rows: nulls, repeated ids, events of unknown items.")
    ] = False,
) -> None:
    """Check everything that a night needs, before the night: settings, storage, inputs, Ray, GPUs, disk, clock.

    Prints one line per check with cause and remedy; every check runs, also after one that failed. Writes nothing but
    a probe in the storage, which is deleted again. Takes less than 30 seconds without --data. The exit code is that
    of the first failed check, as the night would have.
    """
    from tiger_ray.cli.check import check as run_checks

    _end(lambda: run_checks(context.args, data=data))


@_verb(show, "user", cls=SettingsCommand, epilog=EPILOG)
def show_user(
    context: Context,
    user: Annotated[str, typer.Argument(metavar="ID", help="Id of the user, as in the events.")],
) -> None:
    """Show the history of a user with titles, the recommended list with scores, sources and Semantic IDs, and what
    was left out and why.

    Without --date the latest night is shown. Writes nothing; reads one file of users.
    """
    from tiger_ray.cli import show as look

    _end(lambda: look.show_user(context.args, user))


@_verb(show, "item", cls=SettingsCommand, epilog=EPILOG)
def show_item(
    context: Context,
    item: Annotated[str, typer.Argument(metavar="ID", help="Id of the item, as in the catalog.")],
) -> None:
    """Show the Semantic ID of an item, the items that share its first codes, whether the item may be recommended and
    to how many users it is.

    Without --date the latest night is shown. Writes nothing; reads the item ids of all recommendations, one file at a
    time.
    """
    from tiger_ray.cli import show as look

    _end(lambda: look.show_item(context.args, item))


@_verb(show, "run", cls=SettingsCommand, epilog=EPILOG)
def show_run(
    context: Context, date: Annotated[str, typer.Argument(metavar="DATE", help="The night, YYYY-MM-DD.")]
) -> None:
    """Show the stages of a night with rows, bytes and times, and the metrics of the model. Writes nothing."""
    from tiger_ray.cli import show as look

    _end(lambda: look.show_run(context.args, date))


@_verb(app, epilog=EXIT_CODES)
def compare(
    roots: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=ROOT[@DATE]",
            help="Data set and its storage.root; another date of a root is a table of its own, such as "
            "'beauty masked=data/amazon/beauty@2026-11-26'. The first word of NAME chooses the published rows.",
        ),
    ],
    date: Annotated[str, typer.Option(help="Night of the evaluations, YYYY-MM-DD.")],
    reference: Annotated[
        str, typer.Option(help="Artifact that is paired with all others.")
    ] = "evaluation-sasrec-softmax",
    json: Annotated[
        Path | None, typer.Option(help="File for every value; other data sets in the file stay.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            help="Page for the tables, between its lines <!-- results --> and <!-- /results -->; all else on the page "
            "stays."
        ),
    ] = None,
) -> None:
    """Compare the evaluations of a night, the model's and those of the baselines, user by user.

    Prints one Markdown table per data set; with --json and --markdown also writes values and tables into files.
    """
    from tiger_ray.cli.compare import compare as run_comparison

    _end(lambda: run_comparison(roots, date=date, reference=reference, json_file=json, page=markdown))


@_verb(app, cls=SettingsCommand, epilog=EPILOG)
def export(context: Context) -> None:
    """Export the model of a night as a folder that Hugging Face transformers reads without tiger_ray.

    Writes the new folder --export.to FOLDER, all or nothing, and prints its name.
    """

    def act() -> None:
        settings, store = open_night(context.args)
        from tiger_ray.report import export as report

        print(
            report.run(
                settings, store, *(store.resolve(name, settings.date) for name in ("model", "semantic_ids"))
            )
        )

    _end(act)


@_verb(app, cls=SettingsCommand, epilog=EPILOG)
def serve(context: Context) -> None:
    """Serve the model of a night over HTTP until Ctrl-C or SIGTERM.

    Writes nothing. Address, replicas and limits are the settings of section serving.
    """

    def act() -> None:
        settings, store = open_night(context.args)
        from tiger_ray.serving import app as serving

        inputs = [store.resolve(name, settings.date) for name in ("model", "semantic_ids", "sequences")]
        serving.run(settings, store, *inputs)

    _end(act)


@_verb(app, epilog=EXIT_CODES)
def synthesize(
    out: Annotated[str, typer.Option(help="Folder or s3://bucket/prefix to write.")],
    items: Annotated[int, typer.Option(help="Items, a multiple of 20.")] = 800,
    users: Annotated[int, typer.Option(help="Users.")] = 4000,
    min_events: Annotated[int, typer.Option(help="Fewest events of a user.")] = 6,
    max_events: Annotated[int, typer.Option(help="Most events of a user.")] = 20,
    files: Annotated[int, typer.Option(help="Files of the catalog and of the events.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the world and its users.")] = 0,
) -> None:
    """Write a planted world to try the pipeline on: a catalog, events, and the best recall that any model can reach."""

    def act() -> None:
        from tiger_ray.synthetic import world as synthetic

        world = synthetic.World.build(items, seed)
        written = synthetic.write(
            out,
            world,
            num_users=users,
            seed=seed,
            min_events=min_events,
            max_events=max_events,
            num_files=files,
        )
        print(written.summary())

    _end(act)


@_verb(storage, "ls", cls=SettingsCommand, epilog=EPILOG)
def storage_ls(context: Context) -> None:
    """List the artifacts below storage.root: dates, runs, files, bytes and the latest date. Writes nothing."""
    from tiger_ray.cli import storage as kept

    _end(lambda: kept.list_artifacts(context.args))


@_verb(storage, "verify", cls=SettingsCommand, epilog=EPILOG)
def storage_verify(
    context: Context,
    artifact: Annotated[str | None, typer.Argument(help="Only this artifact.", show_default="all")] = None,
    digests: Annotated[
        bool, typer.Option("--digests", help="Read every file and compare its SHA-256.")
    ] = False,
) -> None:
    """Verify that every file of every published manifest is there with its size; exit code 3 names what is damaged.

    Writes nothing.
    """
    from tiger_ray.cli import storage as kept

    _end(lambda: kept.verify_artifacts(context.args, artifact, digests=digests))


@_verb(storage, "rollback", cls=SettingsCommand, epilog=EPILOG)
def storage_rollback(
    context: Context,
    date: Annotated[str, typer.Argument(metavar="DATE", help="A night that is published, YYYY-MM-DD.")],
    artifact: Annotated[str, typer.Option(help="Artifact to set back.")] = "recommendations",
) -> None:
    """Make latest.json of the recommendations name an earlier night, so that readers without a date get that night.

    Writes only latest.json, by compare-and-swap; deletes nothing. The next night that is published for a later date
    becomes the latest again.
    """
    from tiger_ray.cli import storage as kept

    _end(lambda: kept.roll_back(context.args, date, artifact))


if __name__ == "__main__":
    sys.exit(main())
