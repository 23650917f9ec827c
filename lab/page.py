"""A report as one static page that stands by itself: its Markdown as HTML, its picture as SVG, recordings to listen to.

No script, nothing loaded from elsewhere, at most MOST bytes. What is foreign in the report is escaped in its Markdown;
HTML in that is text, and so are links.
"""

import base64
import contextlib
import html
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import data
import lottery
from audio_lottery import sound
from audio_lottery.console import printable
from lab import corpora, scoring
from lab.recognised import Heard

MOST = 2_000_000  # bytes
TYPES = {"WAV": "audio/wav", "WAVEX": "audio/wav", "FLAC": "audio/flac", "OGG": "audio/ogg", "MP3": "audio/mpeg"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; media-src data:; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --line: #d0d4da; --soft: #f3f5f8; --wrong: #b3261e; --ink: #1b1e23; --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --line: #3c424c; --soft: #23272e; --wrong: #ff9a8f; --ink: #e4e7ec; --paper: #16191d } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.25; unicode-bidi: plaintext }
h2 { margin-top: 2.5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line) }
h3 { margin: 1.75rem 0 .5rem; font-size: 1rem }
ul { padding-left: 1.25rem }
.scroll { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border: 1px solid var(--line); text-align: left; unicode-bidi: plaintext;
  overflow-wrap: normal; white-space: nowrap }
td.long { white-space: normal; min-width: 18rem }
th { background: var(--soft) }
td strong { color: var(--wrong) }
audio { display: block; width: 100%; max-width: 30rem; height: 2.5rem; margin: .25rem 0 }
.none { font-size: .9rem; opacity: .75 }
svg { display: block; width: 100%; min-width: 40rem; height: auto; fill: currentColor }
pre { overflow-x: auto; padding: .75rem; background: var(--soft); font-size: .8rem; overflow-wrap: normal }
"""


class Player(NamedTuple):
    kind: str  # of TYPES
    content: bytes
    part: str = ""  # of a segment: from and to which second, as a media fragment

    def html(self) -> str:
        content = base64.b64encode(self.content).decode()
        return f'<audio controls preload="metadata" src="data:{self.kind};base64,{content}{self.part}"></audio>\n'


def page(title: str, markdown: str, svg: str, players: list[Player | str]) -> tuple[bytes, int]:
    """The page, and how many players are in it.

    markdown: a report whose headings of the third level are utterances.  svg: its one picture.  players: one a
    heading, or why there is none; those that would make the page larger than MOST are left out, aloud.
    Raises LotteryError for a page that is larger without any.
    """
    beginning = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(printable(title))}'
        '</title>\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{STYLE}</style>\n</head>\n<body>\n'
    )
    *parts, last = re.split(r"(?<=</h3>\n)", body(markdown, svg))
    pieces = [beginning]
    left = MOST - len("".join([beginning, *parts, last, "</body>\n</html>\n"]).encode()) - 200 * len(parts)
    if left < 0:
        raise lottery.LotteryError(f"the page would be larger than {MOST:,} bytes without a recording, too")
    shown = 0
    for part, player in zip(parts, players):
        told = player if isinstance(player, str) else player.html()
        if not isinstance(player, str) and len(told) > left:
            told = f"left out: with it the page would be larger than {MOST / 1e6:g} MB"
        if told.startswith("<audio"):
            left, shown = left - len(told), shown + 1
        else:
            told = f'<p class="none">No player: {html.escape(cut(printable(told)))}.</p>\n'
        pieces += [part, told]
    return "".join([*pieces, *parts[len(players) :], last, "</body>\n</html>\n"]).encode(), shown


def cut(why: str) -> str:
    return why if len(why) <= 120 else f"{why[:119]}…"


def body(markdown: str, svg: str) -> str:
    """A report's Markdown as HTML: tables that scroll, its one picture in its place."""
    try:
        from markdown_it import MarkdownIt
    except ModuleNotFoundError:
        raise lottery.LotteryError("--html needs the package markdown-it-py: pip install markdown-it-py") from None

    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink", "reference"])
    rules = parser.renderer.rules
    rules["table_open"] = lambda *_: '<div class="scroll" tabindex="0"><table>\n'
    rules["table_close"] = lambda *_: "</table></div>\n"

    def cell(tokens, i, options, env) -> str:
        if len(tokens[i + 1].content) > 40:
            tokens[i].attrSet("class", "long")
        return parser.renderer.renderToken(tokens, i, options, env)

    rules["td_open"] = cell
    rules["image"] = lambda tokens, i, *_: (
        f'</p><div class="scroll" tabindex="0" role="img" aria-label="{html.escape(tokens[i].content)}">{svg}</div><p>'
        if tokens[i].attrs["src"] == "report.png" else html.escape(tokens[i].content)
    )  # fmt: skip
    return parser.render(markdown).replace("<p></p>\n", "")


def inline(svg: str) -> str:
    """A picture of matplotlib's for the inside of a page: of the page's colours, light or dark; no prolog, no comments,
    and no style that would be of the whole page."""
    svg = re.sub(r"<!--.*?-->\s*|<style.*?</style>|<metadata.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("fill: #ffffff", "fill: none").replace("#000000", "currentColor")


# ---------------------------------------------------------------------------- recordings


def players_of(config: dict, test: str, shown: list[Heard]) -> list[Player | str]:
    """The recording of each utterance, its bytes as they are, or why there is none."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what is left out of train is said aloud
            utterances = tests_of(config)[test]
    except (data.DataError, KeyError, OSError) as error:
        why = f"no test set {test}" if isinstance(error, KeyError) else error
        return [f"the recordings are not there ({why})"] * len(shown)
    return [player_of(utterances[h.id], h) if h.id < len(utterances) else "it is not there" for h in shown]


def tests_of(config: dict) -> dict[str, list[data.Utterance]]:
    """The test sets that a run's settings name, where its machine had them."""
    folder, corpus = Path(config["machine"]["data"]), config.get("corpus", "manifests")
    if corpus == "manifests":
        return {"test": scoring.references([str(folder / "test.jsonl")])}  # though a recording may be gone
    return corpora.read(corpus, folder, *(config.get(key) for key in ("train_sets", "valid_sets", "test_sets")))


def player_of(utterance: data.Utterance, heard: Heard) -> Player | str:
    """A recording, if it is the one that was heard and a browser plays it."""
    name, start, seconds = printable(utterance.audio.name), utterance.offset, utterance.duration  # as in test.jsonl
    there = name if start is None else f"{name} from {start:.10g} s"
    before = name if start is None else f"{name} from {start:g} s"  # as it was once written
    if heard.audio not in (there, before) or utterance.text != heard.reference:
        return f"there is another utterance in its place, {there}"
    try:
        if not utterance.audio.is_file():  # a pipe would be waited for
            return f"there is no file {utterance.audio}"
        if os.path.getsize(utterance.audio) > MOST:
            return "its file is larger than the page may be"
        _, kind = sound.about(utterance.audio)
        content = utterance.audio.read_bytes()
    except (OSError, data.DataError) as error:
        return f"cannot read it ({error})"
    if kind not in TYPES:
        return f"browsers do not play {kind}"
    part = "" if start is None else f"#t={start:.10g}" + ("" if seconds is None else f",{start + seconds:.10g}")
    return Player(TYPES[kind], content, part)
