"""The evaluation as Markdown, for Prefect's page: the figures, and the worst pictures embedded."""

from pipelines.data.images import decode_png
from pipelines.evaluation.markup import data_uri
from pipelines.evaluation.pictures import preview
from pipelines.evaluation.results import PICTURES, Evaluation, code

SHOWN = 3


def summary(evaluation: Evaluation) -> str:
    """`Evaluation.markdown`, then for the worst images original, reconstruction and error side by side."""
    worst = [(row, evaluation.folder / PICTURES / row.pictures) for row in evaluation.ranked if row.pictures][:SHOWN]
    parts = [evaluation.markdown()]
    for row, folder in worst:
        file = folder / "side_by_side.png"
        if file.is_file():  # somebody may have removed it since
            shown = data_uri(preview(decode_png(file.read_bytes())))
            parts.append(f"{code(row.name)}, {row.psnr:.2f} dB\n\n![]({shown})\n")
    return "\n".join(parts)
