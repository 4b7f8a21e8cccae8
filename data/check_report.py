"""What `data.check` found, kept in columns of numbers, and its report: a table, `data_report.json`, a picture."""

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.packing import deal, measure_waste

NO_IMAGE = -1
FLAT = 0  # the hash of pictures of one colour, which are not alike for that
NUM_EXAMPLES = 20  # of each kind, in the report
NUM_STEPS = 500  # dealt for the estimate of micro-batches
MAX_PANELS = 12  # sources in the picture, the largest
SOUND = ""  # the reason of a picture that can be read

COLUMNS = {
    "rows": "rows", "usable": "usable_rows", "images": "images", "missing": "missing", "broken": "broken",
    "same": "duplicates", "alike": "look_alikes", "mode": "odd_modes", "kind": "odd_formats",
    "cut": "over_long_rows", "mute": "rows_without_supervised_tokens",
}  # fmt: skip
LEGEND = """\
same: images with the bytes of another; alike: with the dHash of another. mode: not RGB; kind: not what the name says.
cut: rows longer than max_tokens; mute: rows with nothing to learn; learned, tokens: mean of usable rows, the latter and
what follows before any cut."""

NOTES = {
    "odd_modes": "images that are not RGB",
    "odd_formats": "images that are not what their names say",
    "turned_upright": "images turned upright",
    "read_with_a_warning": "images read with a warning",
    "found_by_another_spelling": "images found by another letter case or Unicode form",
    "rows_with_empty_answers": "rows with an empty answer",
    "rows_without_supervised_tokens": "rows with nothing to learn",
    "tokens_cut": "tokens cut from over-long rows",
}


class RowFacts(NamedTuple):
    """What is known of one row."""

    source: str
    image: str | None = None
    flaw: str | None = None  # why it cannot be used
    num_tokens: int = 0  # before the cut to max_tokens
    num_kept: int = 0  # after it
    num_supervised: int = 0  # after it
    has_empty_answer: bool = False


class Codes:
    """Numbers for names, in the order in which they first come."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.code_of = {name: code for code, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> int:
        if name not in self.code_of:
            self.code_of[name] = len(self.names)
            self.names.append(name)
        return self.code_of[name]

    def count(self, codes: np.ndarray) -> dict[str, int]:
        """Return how often each name but the empty one is among `codes`, most frequent first."""
        counts = np.bincount(codes, minlength=len(self)).tolist()
        pairs = [(name, count) for name, count in zip(self.names, counts, strict=True) if name and count]
        return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


class RowsFound:
    """All rows, in the order of the file."""

    def __init__(self) -> None:
        self.sources, self.images = Codes(), Codes()
        self.source, self.image = array("i"), array("i")  # codes; NO_IMAGE for text
        self.num_tokens, self.num_kept, self.num_supervised = array("i"), array("i"), array("i")
        self.has_empty_answer = array("b")
        self.flaws: dict[int, str] = {}  # by row number

    def __len__(self) -> int:
        return len(self.source)

    def add(self, facts: RowFacts) -> None:
        if facts.flaw is not None:
            self.flaws[len(self)] = facts.flaw
        self.source.append(self.sources[facts.source])
        self.image.append(NO_IMAGE if facts.image is None else self.images[facts.image])
        self.num_tokens.append(facts.num_tokens)
        self.num_kept.append(facts.num_kept)
        self.num_supervised.append(facts.num_supervised)
        self.has_empty_answer.append(facts.has_empty_answer)


class PicturesFound:
    """All pictures that rows name: each file once, however its name is spelt."""

    def __init__(self, images: Sequence[str], stored: Sequence[str | None]) -> None:
        """Args: the names as rows give them, and as the folder does (None where it has no such file)."""
        self.files = Codes()
        pairs = list(zip(images, stored, strict=True))
        self.of_image = np.array([self.files[image if name is None else name] for image, name in pairs], dtype=np.int64)
        self.is_renamed = np.array([name not in (None, image) for image, name in pairs], dtype=bool)
        size = len(self.files)
        self.reasons, self.modes, self.formats = Codes(""), Codes("", "RGB"), Codes("")
        self.reason, self.mode, self.odd_format = (np.zeros(size, dtype=np.int32) for _ in range(3))  # codes
        self.is_known, self.is_missing, self.is_turned, self.has_warning = np.zeros((4, size), dtype=bool)
        self.digest, self.hash = np.zeros((2, size), dtype=np.uint64)
        self.problems: dict[int, str] = {}  # by file: why it cannot be used

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Enter what `pictures.jsonl` says of a file."""
        self.is_known[number] = True
        self.mode[number] = self.modes[record["mode"]]
        self.odd_format[number] = self.formats[record["odd_format"]]
        self.is_turned[number] = record["is_turned"]
        self.has_warning[number] = bool(record["warning"])
        self.digest[number] = int(record["sha256"][:16], 16)
        self.hash[number] = int(record["dhash"], 16)
        if record["problem"]:
            self.add_problem(number, record["problem"])

    def add_problem(self, number: int, problem: str, is_missing: bool = False) -> None:
        """Enter that a file cannot be used."""
        self.is_known[number] = True
        self.is_missing[number] = is_missing
        self.problems[number] = problem
        self.reason[number] = self.reasons[_group_reason(problem)]


def make_report(
    rows: RowsFound, pictures: PicturesFound, batch_size: int, micro_batch_tokens: int, num_ranks: int
) -> dict[str, Any]:
    """Count everything: in total, by source, examples of what is bad, and what an epoch of training will be."""
    is_usable = find_usable(rows, pictures)
    total = _describe(rows, pictures, is_usable, np.arange(len(rows)))
    report: dict[str, Any] = {"total": total, "sources": {}}
    source = np.array(rows.source)
    order = np.argsort(source, kind="stable")
    borders = np.searchsorted(source[order], np.arange(len(rows.sources) + 1))
    for name, code in sorted(rows.sources.code_of.items()):
        of_source = order[borders[code] : borders[code + 1]]
        report["sources"][name] = _describe(rows, pictures, is_usable, of_source)
    bad_images = ((pictures.files.names[number], problem) for number, problem in sorted(pictures.problems.items()))
    report["bad_rows"] = _group_examples("rows", rows.flaws.items())
    report["bad_images"] = _group_examples("images", bad_images)
    report["duplicates"] = _find_duplicates(pictures)
    lengths = np.array(rows.num_kept)[is_usable]
    report["packing"] = _estimate_packing(lengths, batch_size, micro_batch_tokens, num_ranks)
    return report


def find_usable(rows: RowsFound, pictures: PicturesFound) -> np.ndarray:
    """Tell of each row whether training can read it, with its picture."""
    is_sound = np.append(pictures.reason[pictures.of_image] == 0, [True])  # the last is that of NO_IMAGE
    is_usable = is_sound[np.array(rows.image)]
    is_usable[list(rows.flaws)] = False
    return is_usable


def _describe(rows: RowsFound, pictures: PicturesFound, is_usable: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """Count what the chosen rows hold."""
    usable = chosen[is_usable[chosen]]
    num_tokens, num_kept, num_supervised = (
        np.array(column)[usable] for column in (rows.num_tokens, rows.num_kept, rows.num_supervised)
    )
    images = np.unique(np.array(rows.image)[chosen])
    images = images[images != NO_IMAGE]
    named = np.unique(pictures.of_image[images])
    sound = named[pictures.reason[named] == 0]
    broken = named[~pictures.is_missing[named]]
    num_flawed = int(np.isin(chosen, list(rows.flaws)).sum())
    uneven = sound[pictures.hash[sound] != FLAT]
    modes = pictures.modes.count(pictures.mode[sound])
    modes.pop("RGB", None)
    return {
        "rows": len(chosen),
        "unreadable_rows": num_flawed,
        "rows_of_bad_images": len(chosen) - num_flawed - len(usable),
        "usable_rows": len(usable),
        "images": len(named),
        "missing": len(named) - len(broken),
        "broken": pictures.reasons.count(pictures.reason[broken]),
        "usable_images": len(sound),
        "found_by_another_spelling": int(pictures.is_renamed[images].sum()),
        "duplicates": len(sound) - len(np.unique(pictures.digest[sound])),
        "look_alikes": len(np.unique(pictures.digest[uneven])) - len(np.unique(pictures.hash[uneven])),
        "odd_modes": modes,
        "odd_formats": pictures.formats.count(pictures.odd_format[sound]),
        "turned_upright": int(pictures.is_turned[sound].sum()),
        "read_with_a_warning": int(pictures.has_warning[sound].sum()),
        "over_long_rows": int((num_kept < num_tokens).sum()),
        "tokens_cut": int((num_tokens - num_kept).sum()),
        "rows_without_supervised_tokens": int((num_supervised == 0).sum()),
        "rows_with_empty_answers": int(np.array(rows.has_empty_answer)[usable].sum()),
        "tokens": _summarize(num_tokens),
        "supervised_tokens": _summarize(num_supervised),
    }


def _summarize(counts: np.ndarray) -> dict[str, float]:
    if not len(counts):
        return dict.fromkeys(("sum", "mean", "median", "p95", "max"), 0)
    median, p95 = np.percentile(counts, (50, 95)).round(1).tolist()
    return {
        "sum": int(counts.sum()),
        "mean": round(float(counts.mean()), 1),
        "median": median,
        "p95": p95,
        "max": int(counts.max()),
    }


def _group_reason(problem: str) -> str:
    """Return a problem without its numbers: what many have in common."""
    return re.sub(r"\b\d+(\.\d+)?\b", "N", problem)


def _group_examples(kind: str, problems: Iterable[tuple[Any, str]]) -> dict[str, dict[str, Any]]:
    """Count problems by reason, with the first examples of each."""
    groups: dict[str, dict[str, Any]] = defaultdict(lambda: {"count": 0, kind: []})
    for which, problem in problems:
        group = groups[_group_reason(problem)]
        group["count"] += 1
        if len(group[kind]) < NUM_EXAMPLES:
            group[kind].append(which)
    return dict(sorted(groups.items(), key=lambda item: (-item[1]["count"], item[0])))


def _find_duplicates(pictures: PicturesFound) -> dict[str, list[list[str]]]:
    """Return the first pairs of pictures that are the same to the byte, and that look alike."""
    sound = np.flatnonzero(pictures.reason == 0)
    _, first, content = np.unique(pictures.digest[sound], return_index=True, return_inverse=True)
    distinct = sound[np.sort(first)]
    distinct = distinct[pictures.hash[distinct] != FLAT]
    _, first_alike, look = np.unique(pictures.hash[distinct], return_index=True, return_inverse=True)
    names = pictures.files.names
    pairs = {}
    for kind, numbers, firsts in (
        ("same_bytes", sound, sound[first][content]),
        ("look_alike", distinct, distinct[first_alike][look]),
    ):
        later = np.flatnonzero(numbers != firsts)[:NUM_EXAMPLES]
        pairs[kind] = [[names[firsts[place]], names[numbers[place]]] for place in later]
    return pairs


def _estimate_packing(lengths: np.ndarray, batch_size: int, micro_batch_tokens: int, num_ranks: int) -> dict[str, Any]:
    """Deal the first steps as training with seed 0 does (from shards its order is another), and count."""
    settings = {"batch_size": batch_size, "micro_batch_tokens": micro_batch_tokens, "ranks": num_ranks}
    num_steps = math.ceil(len(lengths) / batch_size)
    num_dealt = min(num_steps, NUM_STEPS)
    epochs = range(math.ceil(num_dealt * batch_size / max(1, len(lengths))))
    orders = [np.random.default_rng((0, epoch)).permutation(len(lengths)) for epoch in epochs]
    drawn_lengths = lengths[np.concatenate(orders)] if orders else lengths
    num_micro_batches, num_tokens, wastes = [], 0, []
    try:
        for step in range(num_dealt):
            drawn = drawn_lengths[step * batch_size : (step + 1) * batch_size].tolist()
            shares = deal(drawn, num_ranks, micro_batch_tokens)
            num_micro_batches.append(len(shares[0]))
            num_tokens += sum(drawn)
            wastes.append(measure_waste(shares, drawn))
    except ValueError as error:
        return settings | {"steps_per_epoch": num_steps, "problem": str(error)}
    if not num_dealt:
        return settings | {"steps_per_epoch": 0, "problem": "no row can be used"}
    num_packs = num_ranks * sum(num_micro_batches)
    return settings | {
        "steps_per_epoch": num_steps,
        "steps_dealt": num_dealt,
        "micro_batches_per_rank_and_step": round(sum(num_micro_batches) / num_dealt, 2),
        "most_micro_batches_per_rank_and_step": max(num_micro_batches),
        "packs_per_epoch": round(num_packs / num_dealt * num_steps),
        "tokens_per_pack": round(num_tokens / num_packs, 1),
        "share_of_tokens_waited": round(sum(wastes) / num_dealt, 4),
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the table by source, then what is bad and what is odd, by reason."""
    table = [["source", *COLUMNS, "learned", "tokens", "median", "p95", "max"]]
    for name, counts in [*report["sources"].items(), ("total", report["total"])]:
        cells = [counts[key] if isinstance(counts[key], int) else sum(counts[key].values()) for key in COLUMNS.values()]
        cells += [round(counts["supervised_tokens"]["mean"])]
        cells += [round(counts["tokens"][key]) for key in ("mean", "median", "p95", "max")]
        table.append([show(name), *map(str, cells)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)))
    print(LEGEND)
    total = report["total"]
    for kind in ("rows", "images"):
        for reason, group in report[f"bad_{kind}"].items():
            print(f"bad {kind}: {group['count']} x {show(reason)}; first {show(str(group[kind][0]))}")
    for key, title in NOTES.items():
        counts = total[key] if isinstance(total[key], dict) else {"": total[key]}
        if found := ", ".join(f"{count} {show(name)}".strip() for name, count in counts.items() if count):
            print(f"{title}: {found}")
    packing = report["packing"]
    if "problem" in packing:
        print(f"an epoch cannot be estimated: {packing['problem']}")
    else:
        print(
            f"an epoch: {packing['steps_per_epoch']} steps of {packing['batch_size']} rows, "
            f"{packing['micro_batches_per_rank_and_step']:g} micro-batches on each of {packing['ranks']} ranks a step, "
            f"{packing['tokens_per_pack']:.0f} of {packing['micro_batch_tokens']} tokens in each"
        )


def show(text: str) -> str:
    """Return text from a file as it can be shown: a terminal obeys some characters."""
    return text if text.isprintable() else ascii(text)


def draw_lengths(rows: RowsFound, is_usable: np.ndarray, max_tokens: int, picture: Path) -> None:
    """Draw a histogram of the lengths of each source's usable rows, before the cut; the largest sources alone."""
    from matplotlib.figure import Figure

    source, num_tokens = np.array(rows.source)[is_usable], np.array(rows.num_tokens)[is_usable]
    counts = rows.sources.count(source)
    names = list(counts)[:MAX_PANELS]
    end = max(1.1 * max_tokens, min(int(num_tokens.max(initial=0)), 2 * max_tokens))
    figure = Figure(figsize=(8, 1 + 1.2 * max(1, len(names))), layout="constrained")
    panels = figure.subplots(max(1, len(names)), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(panels, names, strict=False):
        lengths = num_tokens[source == rows.sources[name]]
        is_long = lengths > max_tokens
        axis.hist(np.clip(lengths, 0, end), bins=np.linspace(0, end, 111), color="tab:blue")
        axis.axvline(max_tokens, color="tab:red", linestyle="--", linewidth=1)
        title = f"{show(name)}: {len(lengths):,} rows, median {np.median(lengths):,.0f}, {is_long.sum():,} cut"
        axis.set_title(title, loc="left", fontsize=9)
        axis.set(yscale="log", ylim=(0.7, None))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    panels[-1].set_xlabel(f"tokens, before the cut at max_tokens = {max_tokens} (dashed); last bar: {end:.0f} and more")
    figure.supylabel("rows", fontsize=10)
    if len(counts) > len(names):
        figure.suptitle(f"the {len(names)} largest of {len(counts)} sources", fontsize=10)
    figure.savefig(picture, dpi=120)
