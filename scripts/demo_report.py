# SPDX-License-Identifier: Apache-2.0
"""The table and the curve at the end of the demo."""

from pathlib import Path


def bytes_text(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def print_table(results: dict) -> None:
    """Plain text on standard output."""
    rows = [
        ("parameters", f"{results['parameters']:,}"),
        ("ranks", str(results["world"])),
        ("steps", str(len(results["losses"]))),
        ("train loss", f"{results['losses'][0]:.4f} -> {results['train_loss']:.4f}"),
        ("validation loss", f"{results['validation_loss']:.4f}"),
        ("tokens/s", f"{results['tokens_per_second']:.0f}"),
    ]
    for node, daemon in enumerate(results["daemons"]):
        if not daemon:
            continue
        rows += [
            (f"daemon {node}: gathered", bytes_text(daemon["gathered_bytes_total"])),
            (f"daemon {node}: scattered", bytes_text(daemon["scattered_bytes_total"])),
            (f"daemon {node}: sent to others", bytes_text(daemon["sent_bytes_total"])),
            (f"daemon {node}: memory (PSS)", bytes_text(daemon["pss_bytes"])),
        ]
        for kind, size in daemon["memory_bytes"].items():
            rows.append((f"daemon {node}:   {kind}", bytes_text(size)))
    for rank, size in enumerate(results["trainer_pss_bytes"]):
        rows.append((f"trainer {rank}: memory (PSS)", bytes_text(size)))
    for i, seconds in enumerate(results.get("seconds_from_kill_to_next_step", [])):
        rows.append((f"kill {i + 1}: next step after", f"{seconds:.1f} s"))
    if "start_and_import_seconds" in results:
        alone = results["start_and_import_seconds"]
        rows.append(("process start and imports alone", f"{alone:.1f} s"))
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>24}")
    print()


def write_curve(losses: list[float], validation: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1, label="train")
    axes.axhline(validation, color="tab:orange", linewidth=1, label="validation, at the end")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
