"""Records to CSV, JSON and the markdown the README shows."""

import csv
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]
Row = dict[str, Any]


def slug(record: Record) -> str:
    """Names a record's files after its device: `cpu`, `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", (record["environment"]["gpu"] or "cpu").lower()).strip("-")


def write(
    record: Record, folder: pathlib.Path, stem: str, render: Callable[[Record], str] | None = None
) -> list[pathlib.Path]:
    """`stem.json`, `stem.csv` and `stem.md`, the last by `render`, in `folder`, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "csv", "md")]
    paths[0].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=list(record["rows"][0]) if record["rows"] else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(record["rows"])
    paths[2].write_text((render or markdown)(record), encoding="utf-8")
    return paths


def machine(record: Record) -> str:
    """One line: what it ran on, and when."""
    env = record["environment"]
    versions = ", ".join(
        f"{name} {env['versions'][name]}" for name in ("torch", "transformers") if name in env["versions"]
    )
    where = f"{env['gpu']} (driver {env['driver']})" if env["gpu"] else f"{env['cpu']}, {env['threads']} threads"
    commit = f", commit {env['commit']}" if env["commit"] else ""
    return f"{where}; {record['shape']}; Python {env['python']}, {versions}; {env['date']}{commit}."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, its columns padded so that it reads in a terminal too."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]]) + "\n"


def markdown(record: Record) -> str:
    """The whole record: machine, speed, FlexAttention, memory and growth, RetroInfer's, and what was skipped."""
    parts = [machine(record) + "\n", _speed(record["rows"]), _flex(record["rows"]), _memory(record["rows"])]
    parts += [_growth(record["rows"]), _wave(record), _wave_growth(record["rows"]), _fusion(record), _stages(record)]
    parts += [_lamina(record), _decoding(record)]
    parts.append("".join(f"- {note}\n" for note in record["notes"]))
    return "\n".join(part for part in parts if part)


def _speed(rows: list[Row]) -> str:
    dense = {_case(row): row for row in rows if row["contender"] == "sdpa" and row["unit"] == "ms"}
    ours = [row for row in rows if row["kind"] in ("forward", "training", "decode") and row["contender"] != "sdpa"]
    if not ours:
        return ""
    names = {"forward": "forward", "training": "forward + backward", "decode": "decode, 1 token"}
    lines = [
        (names[row["kind"]], *_where(row), row["contender"], *_against(dense[_case(row)], row), _goal(row, ">="))
        for row in ours
    ]
    head = ("what", "tokens", "B", "k", "backend", "SDPA dense, ms", "MoBA, ms", "speed-up (p20-p80)", "target")
    return table(head, lines)


def _flex(rows: list[Row]) -> str:
    ours = [row for row in rows if row["kind"] == "flex" and row["contender"].startswith("attnlab")]
    cells = {(_case(row), row["contender"]): row for row in rows if row["kind"] == "flex"}
    lines = []
    for row in ours:
        others = (cells[_case(row), name] for name in ("sdpa", "flex dense", "flex same blocks"))
        lines.append((*_where(row), row["contender"], *map(_time, others), _time(row)))
    head = ("tokens", "B", "k", "backend", "SDPA dense, ms", "Flex dense, ms", "Flex, same blocks, ms", "MoBA, ms")
    return table(head, lines) if lines else ""


def _memory(rows: list[Row]) -> str:
    lines = [
        (*_where(row), row["contender"], f"{row['p50']:.0f}", f"{row['figure']:.2f}", _goal(row, "<="))
        for row in rows
        if row["kind"] == "memory"
    ]
    head = ("tokens", "B", "k", "forward by", "peak over inputs, MiB", "times q's bytes", "target")
    return table(head, lines) if lines else ""


def _growth(rows: list[Row]) -> str:
    ours = [row for row in rows if row["kind"] == "growth"]
    what = {"whole": "whole forward", "gate": "gate alone", "rest": "apart from the gate"}
    return _grown(ours, f"ns per token, B={ours[0]['block_size']} k={ours[0]['topk']}", what) if ours else ""


def _wave_growth(rows: list[Row]) -> str:
    ours = [row for row in rows if row["kind"] == "wave_growth"]
    return _grown(ours, "ns per token", {"whole": "RetroInfer, index build"}) if ours else ""


def _grown(ours: list[Row], title: str, what: dict[str, str]) -> str:
    lengths = sorted({row["length"] for row in ours})
    lines = []
    for last in (row for row in ours if row["length"] == lengths[-1]):
        same = [row for row in ours if (row["contender"], row["part"]) == (last["contender"], last["part"])]
        each = [f"{row['p50']:.0f}" for row in sorted(same, key=lambda row: row["length"])]
        lines.append((last["contender"], what[last["part"]], *each, f"{last['figure']:.2f}", _goal(last, "<=")))
    return table(("backend", title, *map(str, lengths), "largest / smallest", "target"), lines)


def _wave(record: Record) -> str:
    names = {
        "wave_decode": ("decode, 1 token, ms", "SDPA dense"),
        "wave_build": ("index build, ms", "SDPA causal prefill: 16 x a quarter of the tokens"),
        "wave_faiss": ("k-means alone, ms", "faiss, same starts and assignments"),
        "wave_memory": ("meta index, MiB", "keys and values"),
        "wave_int8": ("meta index in int8, MiB", "keys and values in bfloat16"),
    }
    bases = {_case(row): row for row in record["rows"] if row["contender"] in ("sdpa", "faiss", "KV")}
    lines = []
    for row in record["rows"]:
        if row["kind"] not in names or row["figure"] is None:
            continue
        what, against = names[row["kind"]]
        share = row["kind"] in ("wave_build", "wave_memory", "wave_int8")
        figures = (row[key] for key in ("figure", "figure_p20", "figure_p80"))
        middle, low, high = (f"{100 * x:.1f}%" if share else f"{x:.1f}x" for x in figures)
        spread = "" if low == high else f" ({low}-{high})"
        where = (what, str(row["length"]), row["contender"], _time(row), against, _time(bases[_case(row)]))
        lines.append((*where, middle + spread, _goal(row, "<=", "%") if share else _goal(row, ">=")))
    head = (f"RetroInfer: {record.get('wave_shape')}", "tokens", "backend", "measured", "against", "measured")
    return table((*head, "speed-up or share (p20-p80)", "target"), lines) if lines else ""


def _fusion(record: Record) -> str:
    names = {
        "selective": ("selective attention, 15 % of the rows, ms", "SDPA dense, every row"),
        "selective_mask": ("selective attention, 15 % of the rows, ms", "SDPA, the same rows, boolean mask"),
        "selective_memory": ("its peak over inputs, MiB", "a mask of one byte a pair"),
        "ttft_15": ("time to first token, 15 % recomputed, ms", "full prefill"),
        "ttft_0": ("time to first token, 0 % recomputed, ms", "full prefill"),
    }
    bases = {_case(row): row for row in record["rows"] if row["contender"] in ("sdpa", "prefill")}
    lines = []
    for row in record["rows"]:
        memory = row["kind"] == "selective_memory"
        if row["kind"] not in names or row["figure"] is None or (row["contender"] == "sdpa" and not memory):
            continue
        what, against = names[row["kind"]]
        if memory:
            base, figure = f"{row['p50'] / row['figure']:.0f}", f"{row['figure']:.2f}"
        else:
            base, figure = _time(bases[_case(row)]), _against(bases[_case(row)], row)[2]
        goal = _goal(row, "<=" if memory else ">=")
        lines.append((what, str(row["length"]), row["contender"], _time(row), against, base, figure, goal))
    head = (f"FusionRAG: {record.get('fusion_shape')}", "tokens", "backend", "measured", "against", "measured")
    return table((*head, "speed-up (p20-p80) or share", "target"), lines) if lines else ""


def _stages(record: Record) -> str:
    parts = ("load", "compute", "rotate", "select", "recompute", "first_token", "ttft")
    lines = [
        (f"{row['recomputed']} of {row['context']}", f"{row['loaded_bytes'] / 2**20:.0f}",
         *(f"{1e3 * row[part]:.0f}" for part in parts))
        for row in record.get("stages", ())
        if "recomputed" in row
    ]  # fmt: skip
    head = ("tokens recomputed", "MiB read", *(part.replace("_", " ") + ", ms" for part in parts))
    return table(head, lines) if lines else ""


def _lamina(record: Record) -> str:
    names = {
        "split_decode": ("split decode, 1 token, ms", "SDPA dense", "sdpa"),
        "split_decode_mha": ("the same, a KV head each, ms", "SDPA dense", "sdpa"),
        "split_head": ("8 shards of heads, joined, ms", "one call", "one call"),
        "split_sequence": ("8 shards of tokens, merged, ms", "one call", "one call"),
        "merge_states": ("merge of 8 states, ms", "a copy that moves as many bytes", "copy"),
        "lamina_decode": ("30M Llama, attention apart, ms", "transformers, one process", "one process"),
    }
    bases = {(_case(row), row["contender"]): row for row in record["rows"] if row["kind"] in names}
    lines = []
    for row in record["rows"]:
        if row["kind"] in names and row["figure"] is not None:
            what, against, base = names[row["kind"]]
            length = f"{row['length']} MiB" if row["kind"] == "merge_states" else str(row["length"])
            taken, ours, figure = _against(bases[_case(row), base], row, digits=2)
            lines.append((what, length, row["contender"], ours, against, taken, figure, _goal(row, ">=")))
    head = (f"Lamina: {record.get('lamina_shape')}", "tokens", "backend", "measured", "against", "measured")
    return table((*head, "speed-up (p20-p80)", "target"), lines) if lines else ""


def _decoding(record: Record) -> str:
    lines = []
    for row in record.get("stages", ()):
        if row["kind"] != "lamina_decode":
            continue
        share, over = f"{row['communication']:.0%}", row["bytes"] / row["formula"]
        within = "met" if abs(over - 1) <= 0.01 else "missed"
        sent = f"{row['bytes']:.0f}, {over:.3f} times (2 + 2/G) e d L"
        lines.append((f"{row['tokens']}", f"{row['tokens'] / row['seconds']:.0f}", share, sent, f"within 1%: {within}"))
    head = ("two processes: tokens", "tokens/s", "time without computing", "bytes sent per token", "target")
    return table(head, lines) if lines else ""


def _case(row: Row) -> tuple[Any, ...]:
    return row["kind"], row["length"], row["block_size"], row["topk"]


def _where(row: Row) -> tuple[str, str, str]:
    return str(row["length"]), str(row["block_size"]), str(row["topk"])


def _time(row: Row) -> str:
    digits = 0 if row["p50"] >= 100 else 1 if row["p50"] >= 10 else 2
    return f"{row['p50']:.{digits}f}"


def _against(dense: Row, row: Row, digits: int = 1) -> tuple[str, str, str]:
    middle, low, high = (f"{row[key]:.{digits}f}" for key in ("figure", "figure_p20", "figure_p80"))
    return _time(dense), _time(row), f"{middle}x ({low}-{high})"


def _goal(row: Row, relation: str, unit: str = "") -> str:
    if row["target"] is None:
        return ""
    return f"{relation} {row['target'] * (100 if unit == '%' else 1):g}{unit}: {'met' if row['met'] else 'missed'}"
