"""A sheet of random dialogues for people to judge, and what their marks say.

    python -m data.zh.sheet --work DIR                     writes DIR/sheet.html: open it in a browser, judge, download
    python -m data.zh.sheet --work DIR --tally marks.json  what share is good, by kind, and why the others are not

The page holds its pictures and asks nothing of the network. A second judge's file may follow the first; files named
`marks*.json` in DIR are quoted by the data set's card.
"""

import argparse
import base64
import hashlib
import html
import io
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.image import open_image
from data.journal import read_journal
from data.zh.record import DIALOGUES, Record, Reply, parse_row, read_records, read_replies

SHEET = "sheet.json"
DROPPED = "dropped.jsonl"
PICTURE_SIZE = 640  # pixels, the longer side
JPEG_QUALITY = 82
MARKS = ("good", "wrong", "unclear")
KINDS = {
    "short": "简答", "description": "描述", "conversation": "多轮对话", "reasoning": "推理", "text": "图中文字",
    "counting": "计数", "yes_no": "是非",
}  # fmt: skip
REASONS = {  # key, and what the judge reads
    "not_in_picture": ("q", "图中没有"),
    "wrong_fact": ("w", "事实错误"),
    "bad_question": ("e", "问题不当"),
    "incomplete": ("r", "答非所问或不完整"),
    "bad_chinese": ("a", "中文不自然"),
    "not_suitable": ("s", "隐私或不当内容"),
}


def make_sheet(work: Path, number: int, seed: int, num_dropped: int) -> dict[str, Any]:
    """Write `sheet.html` and `sheet.json`, which says what is on it, and return the latter.

    Args:
        num_dropped: how many of those that `clean` dropped are shown besides, to see whether it was right.
    Raises: FileNotFoundError or ValueError for what is missing or broken in the work folder.
    """
    if number < 1 or num_dropped < 0:
        raise ValueError(f"--number {number} --dropped {num_dropped}: expected at least 1 and 0")
    records = {record.sha256: record for record in read_records(work)}
    kept = [(reply, "") for reply in read_replies(work, DIALOGUES)]
    if not kept:
        raise ValueError(f"{work / DIALOGUES} holds no dialogue to judge")
    dropped = [one for one in read_dropped(work) if one[0].turns and one[0].sha256 in records]
    chosen = choose(kept, number, seed) + choose(dropped, num_dropped, seed)
    chosen.sort(key=lambda one: _draw(one[0], seed))
    ids = [reply.key for reply, _ in chosen]
    items = [
        {"id": reply.key, "kind": reply.kind} | ({"dropped": reason} if reason else {}) for reply, reason in chosen
    ]
    name = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
    sheet = {"sheet": name, "seed": seed, "items": items}
    (work / "sheet.html").write_text(_render(name, chosen, records, work), encoding="utf-8")
    (work / SHEET).write_text(json.dumps(sheet, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return sheet


def choose(replies: Sequence[tuple[Reply, str]], number: int, seed: int) -> list[tuple[Reply, str]]:
    """Return a seeded sample in which every kind has its share: each n-th of the replies ordered by kind."""
    ordered = sorted(replies, key=lambda one: (one[0].kind, _draw(one[0], seed)))
    number = min(number, len(ordered))
    return [ordered[(2 * place + 1) * len(ordered) // (2 * number)] for place in range(number)]


def _draw(reply: Reply, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{reply.key}".encode()).hexdigest()


def read_dropped(work: Path) -> list[tuple[Reply, str]]:
    """Return what `clean` dropped, with its reasons. Raises: ValueError naming the file and the row."""
    dropped = []
    for number, row in enumerate(read_journal(work / DROPPED), start=1):
        reason, detail = row.pop("reason", None), row.pop("detail", "")
        if not isinstance(reason, str) or not reason:
            raise ValueError(f"{work / DROPPED}, row {number}: reason = {reason!r}, expected a text")
        try:
            dropped.append((parse_row(row, Reply), f"{reason} ({detail})" if detail else reason))
        except ValueError as error:
            raise ValueError(f"{work / DROPPED}, row {number}: {error}") from error
    return dropped


def _render(sheet: str, chosen: Sequence[tuple[Reply, str]], records: dict[str, Record], work: Path) -> str:
    """Return the page. Only its own style and script may act: the browser knows them by their hashes."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    articles = []
    for reply, reason in chosen:
        if reply.sha256 not in records:
            raise ValueError(f"{work / DIALOGUES} names the picture {reply.sha256}, which no record has")
        articles.append(_render_item(reply, reason, records[reply.sha256], work))
    reasons = [
        f'<button data-reason="{name}" data-key="{key}">{text}<kbd>{key.upper()}</kbd></button>'
        for name, (key, text) in REASONS.items()
    ]
    for tag in ("style", "script"):
        content = template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        template = template.replace("{{" + tag + "}}", f"sha256-{digest}")
    template = template.replace("{{sheet}}", sheet).replace("{{reasons}}", "\n".join(reasons))
    before, after = template.split("{{items}}")  # last: what the items hold is not ours
    return before + "\n".join(articles) + after


def _render_item(reply: Reply, reason: str, record: Record, work: Path) -> str:
    """Return the part of one dialogue; every text in it comes from elsewhere and is escaped."""
    escape = html.escape
    tags = [f'<span class="kind">{escape(KINDS.get(reply.kind, reply.kind))}</span>']
    tags += [f"<span>{escape(text)}</span>" for text in (record.topic, record.source) if text]
    tags += [f'<span class="dropped">已被筛除：{escape(reason)}</span>'] if reason else []
    section = f" <small>{escape(record.section)}</small>" if record.section else ""
    turns = [
        f'<dt>问</dt><dd>{escape(question)}</dd>\n<dt class="answer">答</dt><dd class="answer">{escape(answer)}</dd>'
        for question, answer in reply.turns
    ]
    credits = [escape(record.author), _link(record.license, record.license_url)]
    credits += [_link(text, url) for text, url in (("图片来源", record.image_url), ("页面", record.page_url)) if url]
    return f"""\
<article data-id="{escape(reply.key)}" hidden>
<figure>{_render_picture(work, record.image)}<figcaption>{" · ".join(filter(None, credits))}</figcaption></figure>
<div class="text">
<p class="tags">{"".join(tags)}</p>
<h2>{escape(record.title)}{section}</h2>
<details><summary>正文（{len(record.text)} 字）</summary><p>{escape(record.text)}</p></details>
<dl>
{chr(10).join(turns)}
</dl>
</div>
</article>"""


def _link(text: str, url: str) -> str:
    """Return a link to the web; any other address could be a script, and is shown as it is."""
    if not url.startswith(("http://", "https://")):
        return html.escape(f"{text} {url}".strip())
    return f'<a href="{html.escape(url)}" target="_blank" rel="noreferrer noopener">{html.escape(text or url)}</a>'


def _render_picture(work: Path, image: str) -> str:
    """Return the picture as a part of the page, or why it cannot be shown."""
    try:
        picture = open_image(work / image)
    except (ValueError, OSError) as error:
        reason = str(error).replace(str(work / image), image)
        return f'<p class="missing">图片无法显示：{html.escape(reason)}</p>'
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}">'


def tally(work: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Return what judges' files say: by judge, and where several of them differ.

    A share is that of "good" among all that a judge has marked, "unclear" included, with its 95 % interval (Wilson).
    What `clean` had dropped counts for itself, as the kind "dropped".

    Raises: FileNotFoundError or ValueError for a file that is missing, broken, or of another sheet.
    """
    items = _load_json(work / SHEET, "`python -m data.zh.sheet --work` writes it")
    kinds = {item["id"]: "dropped" if "dropped" in item else item["kind"] for item in items["items"]}
    marks = {file: _read_marks(file, items["sheet"], kinds) for file in files}
    result: dict[str, Any] = {"items": len(kinds), "judges": [_count(file, of, kinds) for file, of in marks.items()]}
    shared = [name for name in kinds if sum(name in of for of in marks.values()) > 1]
    differing = {}
    for name in shared:
        given = [of[name]["mark"] for of in marks.values() if name in of]
        if len(set(given)) > 1:
            differing[name] = given
    if len(files) > 1:
        result["disagreement"] = {"judged_by_several": len(shared), "differing": differing}
    return result


def _load_json(file: Path, hint: str) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {hint}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _read_marks(file: Path, sheet: str, kinds: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return a file's marks by item."""
    content = _load_json(file, "sheet.html's button downloads it")
    if not isinstance(content, dict) or not isinstance(content.get("marks"), list):
        raise ValueError(f"{file} holds no marks: sheet.html's button downloads them")
    if content.get("sheet") != sheet:
        raise ValueError(
            f"{file} judges the sheet {content.get('sheet')!r}, the work folder's is {sheet!r}: move it away"
        )
    marks: dict[str, dict[str, Any]] = {}
    for number, mark in enumerate(content["marks"]):
        name = mark.get("id") if isinstance(mark, dict) else mark
        if not isinstance(name, str) or name not in kinds:
            raise ValueError(f"{file}, mark {number}: id {name!r} is not on the sheet")
        if name in marks:
            raise ValueError(f"{file}, mark {number}: id {name!r} is marked twice")
        reasons = mark.get("reasons")
        if mark.get("mark") not in MARKS or not isinstance(reasons, list) or not set(map(str, reasons)) <= {*REASONS}:
            raise ValueError(f"{file}, mark {number}: {mark}, expected one of {MARKS}, reasons of {', '.join(REASONS)}")
        marks[name] = mark
    return marks


def _count(file: Path, marks: dict[str, dict[str, Any]], kinds: dict[str, str]) -> dict[str, Any]:
    """Count one judge's marks, by kind and in total."""
    groups: dict[str, Counter[str]] = {kind: Counter() for kind in (*sorted({*kinds.values()} - {"dropped"}), "all")}
    if "dropped" in kinds.values():
        groups["dropped"] = Counter()
    for name, mark in marks.items():
        groups[kinds[name]][mark["mark"]] += 1
        if kinds[name] != "dropped":
            groups["all"][mark["mark"]] += 1
    kept = [mark for name, mark in marks.items() if kinds[name] != "dropped"]
    reasons = Counter(itertools.chain.from_iterable(mark["reasons"] for mark in kept))
    return {
        "file": file.name,
        "judged": len(marks),
        "kinds": {kind: _measure(counts) for kind, counts in groups.items()},
        "reasons": dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
    }


def _measure(counts: Counter[str]) -> dict[str, Any]:
    judged = counts.total()
    measured: dict[str, Any] = {"judged": judged, **{mark: counts[mark] for mark in MARKS}}
    if judged:
        low, high = find_interval(counts["good"], judged)
        measured |= {"share": counts["good"] / judged, "low": low, "high": high}
    return measured


def find_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share. Source: Wilson 1927."""
    z = 1.959964
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def print_tally(result: dict[str, Any]) -> None:
    """Print a table for each judge, and where they differ."""
    for judge in result["judges"]:
        print(f"{judge['file']}: {judge['judged']} of {result['items']} judged")
        print(f"  {'kind':14}{'judged':>8}{'good':>6}{'wrong':>7}{'unclear':>9}{'share good':>12}  95 % interval")
        for kind, found in judge["kinds"].items():
            line = f"  {kind:14}{found['judged']:8}{found['good']:6}{found['wrong']:7}{found['unclear']:9}"
            if found["judged"]:
                line += f"{found['share']:11.1%}   {found['low']:.1%} to {found['high']:.1%}"
            print(line)
        print("  reasons: " + (", ".join(f"{name} {count}" for name, count in judge["reasons"].items()) or "none"))
    if "disagreement" in result:
        num_shared, differing = result["disagreement"]["judged_by_several"], result["disagreement"]["differing"]
        share = f" ({len(differing) / num_shared:.1%})" if num_shared else ""
        print(f"judged by several: {num_shared}, differing: {len(differing)}{share}")
        for name, given in differing.items():
            print(f"  {name}: {', '.join(given)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.zh.sheet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="the work folder")
    parser.add_argument("--number", type=int, default=100, metavar="N", help="dialogues that were kept (default 100)")
    parser.add_argument("--dropped", type=int, default=0, metavar="N", help="and of those dropped (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default 0)")
    parser.add_argument("--tally", type=Path, nargs="+", metavar="FILE", help="judges' marks.json, instead of a sheet")
    arguments = parser.parse_args()
    try:
        if arguments.tally:
            print_tally(tally(arguments.work, arguments.tally))
            return
        sheet = make_sheet(arguments.work, arguments.number, arguments.seed, arguments.dropped)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    file = arguments.work / "sheet.html"
    counts = Counter("dropped" if "dropped" in item else item["kind"] for item in sheet["items"])
    print(
        f"{file}, {file.stat().st_size / 1e6:.1f} MB: {', '.join(f'{count} {kind}' for kind, count in counts.items())}"
    )


if __name__ == "__main__":
    main()
