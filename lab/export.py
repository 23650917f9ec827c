"""The dense masked model as ONNX, for other runtimes: python transcribe.py TICKET --export FILE.onnx

A CTC network is one graph, FILE.onnx: features (1, T, F) -> log_probs (1, T', V). A transducer is three:

    FILE-encoder.onnx      features (1, T, 80) -> encoder_out (1, T'', joiner)
    FILE-predictor.onnx    token (1, 1) int64, h and c (1, 1, H) -> predictor_out (1, joiner), next_h, next_c
    FILE-joiner.onnx       a frame of encoder_out, and predictor_out, (1, joiner) -> logits (1, V)

The predictor starts with the blank, token 0, and zeros. A graph's metadata has the tokens (JSON), the kind of features,
the feature frames in a frame of its output (stride), and for a transducer the most tokens of a frame (max_symbols).
"""

import copy
import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import models
from audio_lottery import files


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


def paths_of(model: nn.Module, path: Path) -> dict[str, Path]:
    """The files of the model's graphs, by part. Raises DataError for a path that names no file."""
    if not path.name or path.name == "..":
        raise data.DataError(f"--export {path}: must name a file")
    if not isinstance(model, models.Transducer):
        return {"": path}
    return {part: path.with_name(f"{path.stem}-{part}{path.suffix}") for part in ("encoder", "predictor", "joiner")}


def export(model: nn.Module, tokens: list[str], path: Path) -> list[Path]:
    """Write the model's graphs, each whole or not at all. Returns their paths.

    Raises DataError without the packages onnx and onnxscript, OSError if a file cannot be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise data.DataError("--export needs two packages: pip install onnx onnxscript (the extra [onnx])") from None
    for target in paths_of(model, path).values():
        files.check_target(target)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LSTM):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Lstm(module))
    about = {"tokens": json.dumps(tokens, ensure_ascii=False), "features": model.features, "stride": str(model.stride)}
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
    paths = paths_of(model, path)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for part, (form, inputs, outputs) in graphs.items():
        frames = {name: {1: torch.export.Dim.DYNAMIC} if name == "features" else None for name in inputs}
        with torch.no_grad():
            program = torch.onnx.export(
                form(model).eval(), tuple(inputs.values()), dynamo=True, verbose=False, dynamic_shapes=frames,
                input_names=list(inputs), output_names=outputs,
            )  # fmt: skip
        program.model.metadata_props.update(about)
        files.write_atomically(paths[part], program.model_proto.SerializeToString())
    return list(paths.values())
