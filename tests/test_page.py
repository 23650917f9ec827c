"""report.html: what is in it, what is escaped, what is too large; and how Chromium shows it, where it is installed."""

import base64
import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from test_recognised import DENSE, SAID, TICKET, texts, write_texts
from test_report import ROUND_0, write_run

from audio_lottery import ledger
from lab import page, report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=x onerror=alert(1)>"


def write_corpus(folder, count=4, references=SAID, name="u{}.wav", format="WAV", **row):
    folder.mkdir()
    lines = []
    for i in range(count):
        noise = np.random.default_rng(i).normal(0, 0.1, 1600)
        soundfile.write(folder / name.format(i), noise, 16_000, format=format)
        lines.append(json.dumps({"audio_filepath": name.format(i), "text": references[i], **row}) + "\n")
    (folder / "test.jsonl").write_text("".join(lines))
    return folder


def write_all(tmp_path, data=None, **settings):
    """A run whose recordings are there."""
    data = data or write_corpus(tmp_path / "corpus")
    run = write_run(tmp_path / "run", [ROUND_0, [3] * 4], data=str(data), epochs=1, **settings)
    write_texts(run, texts(0, DENSE), texts(1, TICKET))
    return run


def page_of(run, capsys, *more) -> tuple[str, str]:
    """The page, and what the command printed."""
    assert report.main([str(run), "--html", *more]) == 0
    return (run / "report.html").read_text(encoding="utf-8"), capsys.readouterr().out


def test_a_page_has_the_report_its_picture_and_the_recordings(tmp_path, capsys):
    run = write_all(tmp_path)
    report.write_report(run, *ledger.read_run(run))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    content, said = page_of(run, capsys)
    assert said == f"{run / 'report.html'}: {len(content.encode()):,} bytes, 4 of 4 recordings\n"
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != "report.html"} == before
    assert content == page_of(run, capsys)[0]  # the same each time
    assert content.count("<svg ") == 1 and '<th style="text-align:right">valid WER</th>' in content
    sounds = re.findall(r'</h3>\n<audio controls preload="metadata" src="data:audio/wav;base64,([^"]+)">', content)
    worst = ["u3.wav", "u1.wav", "u2.wav", "u0.wav"]
    assert [base64.b64decode(sound) for sound in sounds] == [(tmp_path / "corpus" / n).read_bytes() for n in worst]
    assert "<td>ticket</td>\n<td>one</td>\n<td><strong>too</strong></td>" in content
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in content
    assert "prefers-color-scheme: dark" in content and "default-src 'none'" in content


def test_nothing_is_loaded_and_nothing_runs(tmp_path, capsys):
    content, _ = page_of(write_all(tmp_path), capsys)
    sources = re.findall(r'\b(?:src|href|data|action|srcset)="([^"]*)"', content)
    assert sources and all(source.startswith(("data:audio/wav;base64,", "#")) for source in sources)
    assert not re.search(r"<(script|iframe|object|embed|link|form|base)\b|url\((?!#)|@import| on\w+=|-->", content)


def test_foreign_texts_are_text(tmp_path, capsys):
    """In the data's name, settings, names of recordings, references and what was recognised."""
    evil = [EVIL, "![x](http://x.y/z.png) [y](javascript:alert(1))", "</h3>\n<h3>", "&lt;b&gt; --> \x1b[2J"]
    folder = write_corpus(tmp_path / EVIL, references=evil[:2] + ["a", "b"], name="<b onclick=x>{}.wav")
    run = write_run(tmp_path / "run", [ROUND_0, [3] * 4], data=str(folder), epochs=1, tokens=EVIL)
    said = {0: evil, 1: evil[::-1]}
    write_texts(run, *(texts(n, said[n], evil, test=EVIL, audio="<b onclick=x>{}.wav") for n in said))
    content, _ = page_of(run, capsys)
    assert not re.search(r"<(img|b|a|script)\b", content) and "\x1b" not in content
    assert html.escape(EVIL, quote=False) in content and content.count("<h3>") == 4
    assert "&amp;lt;b&amp;gt;" in content  # as it was written, letter for letter


def test_recordings_that_are_not_there(tmp_path, capsys):
    content, said = page_of(write_all(tmp_path, data="/no/where"), capsys)
    assert (
        "<audio" not in content
        and content.count("No player: the recordings are not there (/no/where/test.jsonl: ") == 4
    )
    assert "0 of 4 recordings (the recordings are not there (/no/where/test.jsonl: cannot read" in said


def test_a_recording_is_the_one_that_was_heard_and_one_that_browsers_play(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", references=["the cat sat", "another text", "no", "one two three"])
    (corpus / "u2.wav").write_bytes(b"no audio")
    (corpus / "u0.wav").unlink()
    os.mkfifo(corpus / "u0.wav")
    soundfile.write(corpus / "u3.wav", np.zeros(1600), 16_000, format="NIST")
    content, said = page_of(write_all(tmp_path, corpus), capsys)
    assert "0 of 4 recordings" in said and "<audio" not in content
    (corpus / "u0.wav").unlink()
    soundfile.write(corpus / "u0.wav", np.zeros(1600), 16_000)
    assert "No player: there is no file" in content
    content, said = page_of(tmp_path / "run", capsys)
    assert "1 of 4 recordings" in said and content.count("<audio") == 1
    for why in ("there is another utterance in its place, u1.wav", "cannot read it", "browsers do not play NIST"):
        assert content.count(f"No player: {why}") == 1


def test_a_segment_is_played_from_its_place(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", offset=0.02, duration=0.05)
    run = write_all(tmp_path, corpus)
    write_texts(run, *(texts(n, said, audio="u{}.wav from 0.02 s") for n, said in ((0, DENSE), (1, TICKET))))
    content, _ = page_of(run, capsys)
    assert content.count('#t=0.02,0.07"></audio>') == 4


def test_players_beyond_the_size_are_left_out(tmp_path, capsys, monkeypatch):
    run = write_all(tmp_path)
    whole, _ = page_of(run, capsys)
    player = len(re.search("<audio[^<]*</audio>\n", whole)[0])
    monkeypatch.setattr(page, "MOST", len(whole.encode()) - player)
    content, said = page_of(run, capsys)
    assert "3 of 4" in said or "2 of 4" in said
    assert len(content.encode()) <= page.MOST
    assert "No player: left out: with it the page would be larger than" in content
    monkeypatch.setattr(page, "MOST", 20_000)
    assert report.main([str(run), "--html"]) == 2
    assert "the page would be larger than 20,000 bytes without a recording, too" in capsys.readouterr().err


def test_a_page_of_a_run_without_a_test(tmp_path, capsys):
    run = write_run(tmp_path / "run", [ROUND_0, ROUND_0], epochs=1, test=False)
    config, rows = ledger.read_config(run), []
    for line in (run / "ledger.jsonl").read_text().splitlines():
        row = {k: v for k, v in json.loads(line).items() if not k.startswith(("test_", "verdict", "interval", "power"))}
        for key in ("previous", "timing_sha256"):
            row.pop(key)
        ledger.append_row(None, rows, row, ledger.settings_of(config))
    (run / "ledger.jsonl").write_bytes(b"".join(map(ledger.ledger_line, rows)))
    content, _ = page_of(run, capsys)
    assert "trained with --no-test" in content and content.count("<svg ") == 1


def test_a_page_of_a_run_without_texts_in_another_folder(tmp_path, capsys):
    run = write_run(tmp_path / "plain", [ROUND_0, [3] * 4], epochs=1)
    content, said = page_of(run, capsys)
    assert "0 of 0 recordings" in said and "worst" not in content and "<svg " in content
    assert report.main([str(run), "--html", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


@pytest.mark.parametrize("argv", [["--html"], ["a", "b", "--html"], ["--html", "--compare", "a", "b"]])
def test_a_page_is_of_one_run(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(argv)
    assert stopped.value.code == 2 and "--html is of one run" in capsys.readouterr().err


def test_a_damaged_run_has_no_page(tmp_path, capsys):
    run = write_all(tmp_path)
    (run / "test.jsonl").write_text("{}\n")
    assert report.main([str(run), "--html"]) == 2
    assert "test.jsonl, line 1" in capsys.readouterr().err and not (run / "report.html").exists()


# ---------------------------------------------------------------------------- in a browser


def chromium(*argv) -> bytes:
    """What it prints; whatever the page's policy refuses, or else goes wrong in the page, fails the test."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium): the page is not looked at")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    flags += ["--enable-logging=stderr"]
    done = subprocess.run([CHROMIUM, *flags, *argv], capture_output=True, timeout=120)
    assert done.returncode == 0 and b"CONSOLE" not in done.stderr, done.stderr.decode()
    return done.stdout


def test_chromium_reads_it(tmp_path, capsys):
    """What the browser makes of the page: four players, a picture, and no element of others."""
    run = write_all(tmp_path, tokens=EVIL)
    page_of(run, capsys)
    dom = chromium("--dump-dom", f"file://{run / 'report.html'}").decode()
    assert dom.count("<audio ") == 4 and dom.count("<svg ") == 1 and "<img" not in dom
    assert dom.count("<h3>") == 4 and "<strong>too</strong>" in dom


@pytest.mark.parametrize("width, dark", [(390, True), (1280, False)])
def test_chromium_draws_it(width, dark, tmp_path, capsys):
    """A phone's width in the dark and a desk's in the light: the paper's colour is in the corner, and ink on it."""
    run, shot = write_all(tmp_path), tmp_path / "shot.png"
    page_of(run, capsys)
    theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    chromium(*theme, f"--window-size={width},900", f"--screenshot={shot}", f"file://{run / 'report.html'}")
    from matplotlib.image import imread

    picture = (imread(shot)[..., :3] * 255).round().astype(int)
    assert picture.shape[:2] == (900, width)
    assert picture[2, 2].tolist() == ([0x16, 0x19, 0x1D] if dark else [255, 255, 255])
    assert (abs(picture - picture[2, 2]).sum(-1) > 300).mean() > 0.01
