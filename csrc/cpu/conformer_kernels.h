// The inner loops of conformer.cpp, once an instruction set: instruction_sets.h says how.

namespace ISA {

#include "dense_kernels.h"

// ---------------------------------------------------------------------------- convolution

// count of TILE floats. (A copy of fixed size is two moves, any other a call.)
KERNEL inline void copy(float* to, const float* from, int64_t count) {
  if (count == TILE) {
    std::memcpy(to, from, TILE * sizeof(float));
  } else {
    std::memcpy(to, from, count * sizeof(float));
  }
}

// Channels [first, first + TILE) of one utterance, as many as there are: x (length, 2 * channels), frames and their
// gates -> out (length, channels). weight: (channels, kernel).  room: TILE * (length + 2 * kernel + SOME) floats.
KERNEL void convolve(const float* x, const float* weight, const float* bias, float* out, int64_t channels, int64_t length,
                     int64_t kernel, int64_t first, float* room) {
  constexpr int V = TILE / LANES;
  constexpr int64_t SOME = LANES / 4;  // frames at a time, whose sums stay in registers: 4, 2 or 1
  const int64_t count = std::min(TILE, channels - first);
  float *const weights = room, *const padded = room + kernel * TILE, *const inside = padded + kernel / 2 * TILE;
  float frames[TILE] = {}, gates[TILE] = {}, biases[TILE] = {};
  copy(biases, bias + first, count);
  for (int64_t k = 0; k < kernel; ++k) {
    for (int64_t c = 0; c < TILE; ++c) weights[k * TILE + c] = c < count ? weight[(first + c) * kernel + k] : 0.0f;
  }
  std::fill(padded, inside, 0.0f);
  std::fill(inside + length * TILE, padded + (length + kernel + SOME) * TILE, 0.0f);
  for (int64_t t = 0; t < length; ++t) {
    const float* from = x + 2 * t * channels + first;
    copy(frames, from, count);
    copy(gates, from + channels, count);
    for (int v = 0; v < V; ++v) {
      Floats frame, gate;
      read(frame, frames + v * LANES);
      read(gate, gates + v * LANES);
      sigmoid(gate);
      write(inside + t * TILE + v * LANES, frame * gate);
    }
  }
  for (int64_t t = 0; t < length; t += SOME) {
    Floats sums[SOME][V];
    for (int i = 0; i < SOME; ++i) {
      for (int v = 0; v < V; ++v) read(sums[i][v], biases + v * LANES);
    }
    for (int64_t k = 0; k < kernel; ++k) {
      for (int v = 0; v < V; ++v) {
        Floats w, frame;
        read(w, weights + k * TILE + v * LANES);
        for (int i = 0; i < SOME; ++i) {
          read(frame, padded + (t + i + k) * TILE + v * LANES);
          sums[i][v] += w * frame;
        }
      }
    }
    for (int64_t i = 0; i < std::min(SOME, length - t); ++i) {
      for (int v = 0; v < V; ++v) {
        Floats gate = sums[i][v];
        sigmoid(gate);
        write(frames + v * LANES, sums[i][v] * gate);
      }
      copy(out + (t + i) * channels + first, frames, count);
    }
  }
}

// ---------------------------------------------------------------------------- attention

// Each of `frames` vectors of two halves (a, b), `apart` floats apart -> (a cos - b sin, a sin + b cos) * factor, whose
// numbers are `across` apart, one vector's `along` behind another's.
KERNEL void turn(const float* x, int64_t apart, const float* cos, const float* sin, int64_t frames, int64_t half,
                 float factor, float* out, int64_t along, int64_t across) {
  for (int64_t t = 0; t < frames; ++t, x += apart, cos += half, sin += half, out += along) {
    for (int64_t i = 0; i < half; ++i) {
      out[i * across] = (x[i] * cos[i] - x[half + i] * sin[i]) * factor;
      out[(half + i) * across] = (x[i] * sin[i] + x[half + i] * cos[i]) * factor;
    }
  }
}

// scores (wide) -> exp of each less the largest. Returns their sum.
KERNEL float exponentials(float* scores, int64_t wide) {
  Floats most, x, sum{};
  float lanes[LANES];
  read(most, scores);
  for (int64_t i = LANES; i < wide; i += LANES) {
    read(x, scores + i);
    most = x > most ? x : most;
  }
  write(lanes, most);
  for (int half = LANES / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  }
  const float top = lanes[0];
  for (int64_t i = 0; i < wide; i += LANES) {
    read(x, scores + i);
    x -= top;
    x = x < -87.0f ? Floats{} - 87.0f : x;  // 1e-38, as good as 0
    exponential(x);
    sum += x;
    write(scores + i, x);
  }
  write(lanes, sum);
  for (int half = LANES / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// One head of an utterance of `length` frames: queries, keys and values at x, `apart` floats from frame to frame -> out
// (length, head.size), `apart_out` from frame to frame.
KERNEL void attend(const Head& head, const float* x, int64_t apart, int64_t length, float* out, int64_t apart_out,
                   Scratch& s) {
  const int64_t size = head.size, half = size / 2;
  turn(x, apart, head.cos, head.sin, length, half, 1 / std::sqrt(static_cast<float>(size)), s.queries.data(), size, 1);
  turn(x + head.between, apart, head.cos, head.sin, length, half, 1.0f, s.keys.data(), 1, s.wide);
  for (int64_t i = 0; i < size; ++i) {  // what an utterance before left there could be a NaN
    std::fill(s.keys.data() + i * s.wide + length, s.keys.data() + (i + 1) * s.wide, 0.0f);
  }
  for (int64_t t = 0; t < length; ++t) {
    std::memcpy(&s.values[t * s.padded], x + t * apart + 2 * head.between, size * sizeof(float));
  }
  std::fill(s.start.begin() + length, s.start.end(), -INFINITY);
  for (int64_t first = 0; first < length; first += s.rows) {
    const int64_t rows = std::min(s.rows, length - first), whole = round_up(rows, ROWS);
    multiply(&s.queries[first * size], size, 1, s.keys.data(), size, s.start.data(), s.scores.data(), s.wide, whole);
    for (int64_t r = 0; r < rows; ++r) s.totals[r] = exponentials(&s.scores[r * s.wide], s.wide);
    multiply(s.scores.data(), s.wide, 1, s.values.data(), length, s.zeros.data(), s.sums.data(), s.padded, whole);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + (first + r) * apart_out;
      for (int64_t i = 0; i < size; ++i) to[i] = s.sums[r * s.padded + i] / s.totals[r];
    }
  }
}

constexpr Kernels KERNELS{convolve, attend};

}  // namespace ISA
