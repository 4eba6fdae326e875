"""``pyramidinfer profile``: measure and show how much each KV head of a model needs."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pyramidinfer.cli.choices import ProfileOptions
    from pyramidinfer.engine.profiling import Found
    from pyramidinfer.lab.samples import Subject
    from pyramidinfer.policies.profile import Profile

__all__ = ["check_place", "heat_map", "run_profile"]

#: Up to this number of heads, a layer shows numbers; with more it shows shades.
NUMBERS = 16
#: A calibration stays valid if no head's share changes by more.
SAME_SHARE = 0.01
SHADES = " ░▒▓█"


def run_profile(where: Subject, options: ProfileOptions) -> None:
    """Measure and store a profile, and show it; a stored one is only shown."""
    from pyramidinfer.engine.profiling import look_up
    from pyramidinfer.models.loading import quiet_transformers
    from pyramidinfer.policies import Full
    from pyramidinfer.policies.profile import check_target

    output, picture = options.output, options.picture
    for path, what in ((output, "the profile"), (picture, "the picture")):
        if path is not None:
            check_target(path, what)
    quiet_transformers()
    llm = where.llm(Full())
    found, anew = look_up(llm.engine.runner), options.force or where.text is not None
    if anew:
        check_place(found, output)
    seconds = None
    if found is None or anew:
        from pyramidinfer.engine.profiling import store_profile
        from pyramidinfer.lab.heads import measure_profile

        begun = time.monotonic()
        made = measure_profile(llm, where)
        seconds = time.monotonic() - begun
        if found is not None:
            made = _with_calibration(made, found.profile)
        lies = store_profile(made) if output is None else made.save(output)
    else:
        made, lies = found
        lies = lies if output is None else made.save(output)
    if picture is not None:
        from pyramidinfer.lab.head_pictures import draw_profile

        draw_profile(made, picture)
    if options.as_json:
        print(
            json.dumps(
                {
                    "model": where.model,
                    "path": str(lies),
                    "seconds": seconds,
                    "profile": made.as_dict(),
                }
            )
        )
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(heat_map(where.model, made))
    how = "made before" if seconds is None else f"{seconds:.1f} s"
    console.print(
        f"measured on {made.text} ({how}); two texts agree on the heads' order by "
        f"{made.agreement:.2f} (Spearman)"
    )
    if made.calibrated is None:
        console.print(
            "not calibrated: pyramidinfer calibrate finds how early tokens may be dropped"
        )
    else:
        console.print(f"calibrated: {made.calibrated.going}")
    for each in filter(None, (lies, picture)):
        print(each)


def _with_calibration(made: Profile, old: Profile) -> Profile:
    """The profile with the calibration of the profile it replaces.  The calibration depends on the
    heads' shares: if they differ now, it is left out, with a message."""
    if old.calibrated is None:
        return made
    pairs = zip(made.share, old.share, strict=True)
    moved = max(abs(a - b) for rows in pairs for a, b in zip(*rows, strict=True))
    if moved <= SAME_SHARE:
        return replace(made, calibrated=old.calibrated)
    print(
        f"the calibration ({old.calibrated.going}) is left out: it was made with other shares (one "
        f"moved by {moved:.1%}); run pyramidinfer calibrate again",
        file=sys.stderr,
    )
    return made


def check_place(found: Found | None, output: Path | None) -> None:
    """``ValueError`` if a new profile would be stored where it is never read."""
    from pyramidinfer.engine.profiling import shipped_folder

    if output is None and found is not None and found.path.parent == shipped_folder():
        raise ValueError(
            "the package has a profile of this model, which takes precedence over the cache "
            "folder: write your own with --output FILE, and use it by that name"
        )


def heat_map(title: str, profile: Profile) -> Table:
    """Layers × heads; a head's share as a number, or as a shade if there are many."""
    table = Table(title=f"{title}: share of its entries that each KV head needs")
    table.add_column("layer", justify="right")
    widest = max(map(len, profile.share))
    if widest <= NUMBERS:
        for head in range(widest):
            table.add_column(f"head {head}" if widest <= 8 else str(head), justify="right")
    else:
        table.add_column(f"heads 0 to {widest - 1}", no_wrap=True)
    table.add_column("mean", justify="right")
    for layer, row in enumerate(profile.share):
        if not profile.governed[layer]:
            cells = [Text("·", style="dim")] * (widest if widest <= NUMBERS else 1)
            table.add_row(str(layer), *cells, Text("window", style="dim"))
            continue
        shown = [_number(share) for share in row] + [Text("")] * (widest - len(row))
        if widest > NUMBERS:
            shown = [Text("".join(_shade(share) for share in row))]
        table.add_row(str(layer), *shown, f"{sum(row) / len(row):.0%}")
    return table


def _number(share: float) -> Text:
    style = "bold red" if share >= 0.5 else "yellow" if share >= 0.2 else "dim"
    return Text(f"{share:.0%}", style=style)


def _shade(share: float) -> str:
    return SHADES[min(len(SHADES) - 1, round(share * (len(SHADES) - 1) + 0.25))]
