"""The dense masked model as ONNX, for other runtimes: python transcribe.py TICKET --export FILE.onnx

A CTC network is one graph, FILE.onnx: features (1, T, F) -> log_probs (1, T', V). A transducer is three:

    FILE-encoder.onnx      features (1, T, 80) -> encoder_out (1, T'', joiner)
    FILE-predictor.onnx    token (1, 1) int64, h and c (1, 1, H) -> predictor_out (1, joiner), next_h, next_c
    FILE-joiner.onnx       a frame of encoder_out, and predictor_out, (1, joiner) -> logits (1, V)

The predictor starts with the blank, token 0, and zeros. A graph's metadata has the tokens (JSON), the kind of features,
the feature frames in a frame of its output (stride), and for a transducer the most tokens of a frame (max_symbols).
Beside the graphs is tokens.txt: line N, counted from 0, is token N; line 0 is <blank>, and a space is written as ▁.
docs/onnx_transcribe.py uses all of it without torch.
"""

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import models
from audio_lottery import checked, files


class Lstm(nn.Module):
    """nn.LSTM of one layer as ONNX's own operator: torch.export unrolls it to the length of the example."""

    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.hidden = lstm.hidden_size

        def in_order(w: Tensor) -> Tensor:  # torch has the gates i, f, g, o, ONNX i, o, f, g
            return w.detach().unflatten(0, (4, -1))[[0, 3, 1, 2]].flatten(0, 1)

        self.register_buffer("weight_ih", in_order(lstm.weight_ih_l0)[None])
        self.register_buffer("weight_hh", in_order(lstm.weight_hh_l0)[None])
        self.register_buffer("bias", torch.cat([in_order(lstm.bias_ih_l0), in_order(lstm.bias_hh_l0)])[None])

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None):
        """(B, T, inputs) -> (B, T, hidden), (h, c), each (1, B, hidden)."""
        batch, time = x.shape[:2]
        one = (1, batch, self.hidden)
        out, h, c = torch.onnx.ops.symbolic_multi_out(
            "LSTM", [x.transpose(0, 1), self.weight_ih, self.weight_hh, self.bias, None, *(state or ())],
            {"hidden_size": self.hidden}, dtypes=[x.dtype] * 3, shapes=[(time, 1, batch, self.hidden), one, one],
        )  # fmt: skip
        return out[:, 0].transpose(0, 1), (h, c)


class Ctc(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        return self.model(features, torch.full((1,), features.shape[1]))[0]


class Encoder(Ctc):
    def forward(self, features: Tensor) -> Tensor:
        encoded = self.model.encode(features, torch.full((1,), features.shape[1]))
        return self.model.every_second(*encoded)[0]


class Predictor(Ctc):
    def forward(self, token: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, (h, c) = self.model.predict(token, (h, c))
        return out[:, 0], h, c


class Joiner(Ctc):
    def forward(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        return self.model.join(encoder_out + predictor_out)


TOKENS = "tokens.txt"


def target(path: Path) -> Path:
    """The path with .onnx behind it. Raises DataError for one that names no file, OSError if none can be written."""
    if not path.name or path.name == "..":
        raise data.DataError(f"--export {path}: must name a file")
    files.check_target(path)  # as it was typed: /dev/null is no prefix
    path = path if path.suffix.lower() == ".onnx" else path.with_name(f"{path.name}.onnx")
    files.check_target(path)
    return path


def token_lines(tokens: list[str]) -> bytes:
    """tokens.txt. No token has a line's end in it (networks.TOKEN)."""
    named = [data.BLANK, *(token.replace(" ", data.SPACE) for token in tokens[1:])]
    return "".join(f"{token}\n" for token in named).encode()


def check_others(path: Path, own: Iterable[Path]) -> None:
    """Raise DataError if graphs of the other kind have this name: who looks for FILE would find two networks."""
    for part in ("", "-encoder", "-predictor", "-joiner"):
        there = path.with_name(f"{path.stem}{part}{path.suffix}")
        if there.exists() and there not in own:
            raise data.DataError(f"{there}: is there, of another kind of network: export by another name")


def check_tokens(path: Path, content: bytes) -> None:
    """Raise DataError if there is another tokens.txt: graphs of two tickets in one folder would share it.

    LotteryError if it cannot be read.
    """
    if path.exists() and checked.read_bytes(path, "list of tokens") != content:
        raise data.DataError(f"{path}: is there with other tokens than this ticket's: export to another folder")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, neither torch nor its exporter's packages warn of what is theirs."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def paths_of(model: nn.Module, path: Path) -> dict[str, Path]:
    """The files of the model's graphs, by part."""
    if not isinstance(model, models.Transducer):
        return {"": path}
    return {part: path.with_name(f"{path.stem}-{part}{path.suffix}") for part in ("encoder", "predictor", "joiner")}


def export(model: nn.Module, tokens: list[str], path: Path, one_mean: bool = False) -> list[Path]:
    """Write the model's graphs and tokens.txt, each whole or not at all. Returns their paths.

    path: .onnx is put after it where it is missing.  one_mean: of the features, as in data.normalize; metadata say so.
    Raises DataError without the packages onnx and onnxscript, for a tokens.txt of other tokens, and for graphs of the
    other kind by this name; OSError if a file cannot be written.
    """
    path = target(path)
    check_tokens(listed := path.with_name(TOKENS), token_lines(tokens))
    try:
        with quiet():
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError:
        raise data.DataError("--export needs two packages: pip install onnx onnxscript (the extra [onnx])") from None
    paths = paths_of(model, path)
    check_others(path, paths.values())
    for one in [*paths.values(), listed]:
        files.check_target(one)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LSTM):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Lstm(module))
    about = {"tokens": json.dumps(tokens, ensure_ascii=False), "features": model.features, "stride": str(model.stride),
             "normalization": "one mean" if one_mean else "a mean a bin"}  # fmt: skip
    features = torch.randn(1, 203, models.CnnLstm.BINS[model.features])
    if isinstance(model, models.Transducer):
        about["max_symbols"] = str(model.MAX_SYMBOLS)
        state = torch.zeros(2, 1, 1, model.predictor.hidden).unbind()
        joined = torch.zeros(2, 1, model.output.in_features).unbind()
        graphs = {
            "encoder": (Encoder, {"features": features}, ["encoder_out"]),
            "predictor": (
                Predictor, {"token": torch.zeros(1, 1, dtype=torch.int64), "h": state[0], "c": state[1]},
                ["predictor_out", "next_h", "next_c"],
            ),
            "joiner": (Joiner, {"encoder_out": joined[0], "predictor_out": joined[1]}, ["logits"]),
        }  # fmt: skip
    else:
        graphs = {"": (Ctc, {"features": features}, ["log_probs"])}
    contents = {}
    for part, (form, inputs, outputs) in graphs.items():
        frames = {name: {1: torch.export.Dim.DYNAMIC} if name == "features" else None for name in inputs}
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                form(model).eval(), tuple(inputs.values()), dynamo=True, verbose=False, dynamic_shapes=frames,
                input_names=list(inputs), output_names=outputs,
            )  # fmt: skip
        program.model.metadata_props.update(about)
        contents[paths[part]] = program.model_proto.SerializeToString()
    contents[listed] = token_lines(tokens)
    for one, content in contents.items():
        files.write_atomically(one, content)
    return list(contents)
