"""What `codecmill clean` shows: each folder that went or would go, and what that makes in all."""

from collections.abc import Sequence

from rich.text import Text

from flows.cli.listing import output, readable_size
from pipelines.cleaning import Removable


def print_cleaned(gone: Sequence[Removable], found: Sequence[Removable], dry_run: bool) -> None:
    console = output()
    for each in found:
        verb = "would remove" if dry_run else "removed" if each in gone else "left"
        about = f"({readable_size(each.bytes)}, {each.days:.0f} days old)"
        console.print(Text(f"{verb} the {each.kind} {each.path} {about}"), soft_wrap=True)
    total = f"{len(gone)} folder{'' if len(gone) == 1 else 's'}, {readable_size(sum(each.bytes for each in gone))}"
    if not found:
        console.print("Nothing to remove.")
    elif dry_run:
        console.print(f"{total}. Without --dry-run they go.")
    else:
        console.print(f"Gone: {total}.")
