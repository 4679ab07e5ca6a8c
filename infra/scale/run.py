"""Prints the tables of infra/SCALE.md: `python -m infra.scale.run`, some ten seconds."""

from infra.scale.needs import Assumed, Measured, needs
from infra.scale.simulation import balance, cluster, fetched, order_bytes

WINDOWS, EPOCHS = 2, 3


def tables() -> str:
    """Both tables in Markdown."""
    assumed = Assumed()
    rows = ["| what | how much |", "|---|---|"]
    rows += [f"| {name} | {value} |" for name, value in needs(assumed, Measured()).items()]
    shards = assumed.images * assumed.patches_an_image // assumed.samples_a_shard
    of = cluster(shards, assumed.samples_a_shard, assumed.hosts, assumed.gpus_a_host, window=64)
    found = balance(of, WINDOWS)
    rows += ["", "| of the simulation | |", "|---|---|"]
    rows += [
        f"| samples of a window (some 500,000) that a rank has more than another | {found.apart} |",
        f"| shards of a window that a host touches | {100 * found.least_touched:.0f} % |",
    ]
    for share in (0.02, 0.5, 0.9, 1.0):
        misses = fetched(of, int(share * shards), EPOCHS)
        told = ", ".join(f"{100 * each:.0f} %" for each in misses)
        rows.append(f"| fetched in {EPOCHS} epochs, with {100 * share:.0f} % of the set in the cache | {told} |")
    return "\n".join(rows)


def main() -> None:
    print(tables())
    of = cluster(10_000, 8_000, 8, 8, window=64)
    print(f"\nMemory for the order, a rank: {order_bytes(of) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
