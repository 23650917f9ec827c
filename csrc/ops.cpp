// All operators of Audio Lottery. Implementations: cpu/*.cpp and cuda/*.cu, names mirrored; checks: checks.h;
// the slow references they are tested against: lottery.py, models.py, audio_lottery/sparse.py and fused.py.

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/extension.h>
#include <torch/library.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace audio_lottery {
std::string sparse_instructions(const std::string& name);  // cpu/sparse.cpp
int64_t byte_lanes();
}

TORCH_LIBRARY(audio_lottery, m) {
  // Zero weights and gradients where the mask is false, in place. grads may be empty.
  m.def("hold_ticket_(Tensor(a!)[] weights, Tensor(b!)[] grads, Tensor[] masks) -> ()");
  // Masks of the `keep` largest |w| among surviving weights; ties: earlier tensor, then lower flat index, is kept.
  m.def("global_magnitude_masks(Tensor[] weights, Tensor[] masks, int keep) -> Tensor[]");
  // The sum of |w| over each tile of rows x columns of each weight, seen as (size(0), the rest), in float64.
  m.def("block_norms(Tensor[] weights, int rows, int columns) -> Tensor[]");
  // The transducer's loss, summed over the batch, whose logits are tanh(encoder_out[b, t] + predictor_out[b, u]) through
  // weight and bias, token 0 the blank; and its gradients by these four.
  m.def(
      "transducer_loss(Tensor encoder_out, Tensor predictor_out, Tensor weight, Tensor bias, Tensor targets, int[] lengths, "
      "int[] target_lengths) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // x (..., inputs) times a matrix of kept blocks: values (blocks, r, c), columns uint16, offsets int32 (cpu/sparse.cpp).
  m.def(
      "sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor offsets, Tensor? scales, Tensor? bias, int outputs) "
      "-> Tensor");
  // A convolution of x (batch, channels, height, width) whose weights, seen as (outputs, channels * height * width of the
  // kernel), are such a matrix.
  m.def(
      "sparse_conv2d(Tensor x, Tensor values, Tensor columns, Tensor offsets, Tensor? scales, Tensor? bias, int outputs, "
      "int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor");
  // LSTM over projections (batch, time, 4 * hidden) = inputs through W_ih, with both biases; the matrix is W_hh. Reverse
  // starts at each end. Returns outputs (zeros behind an end) and the last h and c. windows: the matrix again, of single
  // weights, in the form that is fastest for few utterances (cpu/sparse.cpp), or nothing.
  m.def(
      "sparse_lstm(Tensor projections, Tensor values, Tensor columns, Tensor offsets, Tensor? scales, Tensor h0, "
      "Tensor c0, Tensor? lengths, bool reverse, Tensor[] windows) -> (Tensor, Tensor, Tensor)");
  // Greedy decoding of one utterance: encoder_out (frames, joiner) and projection (joiner, hidden) are what is added
  // before tanh, inputs (tokens, 4 * hidden) are the embeddings through W_ih, with both biases; recurrent is W_hh. Returns
  // the tokens, their frames and probabilities, and the state to go on from: [predictor_out, h, c], none at the start.
  // windows: as in sparse_lstm, or W_hh in bytes, which is taken then.
  m.def(
      "sparse_transducer(Tensor encoder_out, Tensor inputs, Tensor[] recurrent, Tensor[] projection, Tensor[] output, "
      "Tensor? bias, int max_symbols, Tensor[] state, Tensor[] windows) -> (Tensor, Tensor, Tensor, Tensor[])");
  // sparse_linear, sparse_conv2d and sparse_lstm with inputs that are rounded to eight bits, each column or image by its own
  // scale; bytes are the tensors of the matrix in that form (cpu/bytes.h).
  m.def("sparse_linear_in_bytes(Tensor x, Tensor[] bytes, Tensor? bias, int outputs) -> Tensor");
  m.def(
      "sparse_conv2d_in_bytes(Tensor x, Tensor[] bytes, Tensor? bias, int outputs, int[] kernel, int[] stride, int[] padding, "
      "int[] dilation) -> Tensor");
  m.def(
      "sparse_lstm_in_bytes(Tensor projections, Tensor[] bytes, Tensor h0, Tensor c0, Tensor? lengths, bool reverse) "
      "-> (Tensor, Tensor, Tensor)");
  // The same after sparse_linear_in_bytes(x, inputs, bias), W_ih and both biases, whose results never are in memory at once.
  m.def(
      "sparse_lstm_layer_in_bytes(Tensor x, Tensor[] inputs, Tensor? bias, Tensor[] recurrent, Tensor h0, Tensor c0, "
      "Tensor? lengths, bool reverse) -> (Tensor, Tensor, Tensor)");
  // A Conformer's GLU of x (batch, 2 * channels, time), depthwise convolution by weight (channels, an odd kernel) and SiLU:
  // (batch, channels, time), zeros behind each end.
  m.def("gated_convolution(Tensor x, Tensor weight, Tensor bias, Tensor? lengths) -> Tensor");
  // Attention of qkv (batch, time, 3 * heads * size), queries and keys turned by rotary positions, cos and sin (time, size /
  // 2), to the keys before each end: (batch, time, heads * size), zeros behind it.
  m.def("rotary_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor? lengths, int heads) -> Tensor");
}

// The operators of inference: backward through one is an error that names it, where torch would leave its part out.
TORCH_LIBRARY_IMPL(audio_lottery, Autograd, m) {
  for (const char* name : {"sparse_linear", "sparse_conv2d", "sparse_lstm", "sparse_transducer", "gated_convolution",
                           "rotary_attention", "sparse_linear_in_bytes", "sparse_conv2d_in_bytes", "sparse_lstm_in_bytes",
                           "sparse_lstm_layer_in_bytes"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

// Facts about this build; tensors go through the dispatcher.
PYBIND11_MODULE(_lottery, m) {
  // Has the sparse operators take lesser instructions, for tests: DEFAULT, AVX2 or AVX512. Returns what they took before.
  m.def("sparse_instructions", &audio_lottery::sparse_instructions);
  // Lanes of the products in bytes that the sparse operators take on this processor, or 0: it has none that are fast.
  m.def("byte_lanes", &audio_lottery::byte_lanes);
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["version"] = AUDIO_LOTTERY_VERSION;
#ifdef AUDIO_LOTTERY_CUDA
    facts["cuda"] = AUDIO_LOTTERY_CUDA;  // the architectures
#else
    facts["cuda"] = pybind11::none();
#endif
#ifdef _OPENMP
    facts["openmp"] = true;
#else
    facts["openmp"] = false;
#endif
    facts["compiler"] = __VERSION__;
    facts["torch"] = TORCH_VERSION;
#if defined(__x86_64__) && !defined(AUDIO_LOTTERY_BASELINE)
    __builtin_cpu_init();
    facts["instructions"] = __builtin_cpu_supports("avx512f") ? "AVX-512" : __builtin_cpu_supports("avx2") ? "AVX2" : "SSE2";
#else
    facts["instructions"] = "baseline";
#endif
    return facts;
  });
}
