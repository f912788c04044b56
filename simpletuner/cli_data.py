"""The commands `simpletuner data`: a look at images and captions before they are trained."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from simpletuner.cli_options import TAKES_OVERRIDES, ConfigOption, Overrides, Overwrite
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.logs import configure_logging
from simpletuner.helpers.io.names import counted

app = typer.Typer(no_args_is_help=True, help="Look at images and captions before they are trained.")


@app.callback()
def data() -> None:
    """Look at images and captions before they are trained."""


@app.command("look", context_settings=TAKES_OVERRIDES)
def look_command(
    *,
    config: ConfigOption = None,
    arguments: Overrides = None,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The page to write.")] = Path(
        "data.html"
    ),
    trigger: Annotated[
        list[str] | None,
        typer.Option(
            "--trigger",
            metavar="TEXT",
            help="List captions that lack this text; with several, all of them. Default: instance_prompt.",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Images shown at most, those with findings first.")
    ] = 1000,
    overwrite: Overwrite = False,
) -> None:
    """Write a page of the images as they are cut, with captions, buckets, duplicates and problems.

    Exit code 1 if a run would refuse a dataset; the page says why.
    """
    from simpletuner.helpers.configuration.finding import choose_config
    from simpletuner.helpers.configuration.load import load_config
    from simpletuner.helpers.io.new_files import refuse_existing
    from simpletuner.helpers.models import registry

    triggers = [each.strip() for each in trigger or ()]
    if "" in triggers:
        raise ConfigError("--trigger: the text is empty. Give a word or words that each caption should have.")
    file, overrides = choose_config(config, arguments or ())
    run = load_config(file, overrides=overrides, families=registry.specs())
    refuse_existing([output], overwrite=overwrite)
    configure_logging(main_process=True)
    # Their image library is not needed above.
    from simpletuner.helpers.reporting.data_page.findings import KINDS
    from simpletuner.helpers.reporting.data_page.look import look
    from simpletuner.helpers.reporting.data_page.page import write_page
    from simpletuner.helpers.reporting.html_report.folder import display_path

    looked = look(run, registry.specs()[run.model.model_family], triggers=triggers)
    write_page(output, looked, run, name=display_path(file), limit=limit)
    images = [image for each in looked for image in each.images]
    found = sum(bool(image.findings) for image in images)
    skipped = sum(len(each.skipped) for each in looked)
    print(
        f"{output}: {counted(len(images), 'image')}, {found:,} with findings; "
        f"{counted(skipped, 'file')} left out."
    )
    numbers = Counter(key for image in images for key in image.findings)
    for key, (title, _) in KINDS.items():
        if numbers[key]:
            print(f"{numbers[key]:>7,}  {title}")
    refused = [each for each in looked if each.problem]
    for each in refused:
        print(f"  {each.problem}")
    if refused:
        raise typer.Exit(1)
