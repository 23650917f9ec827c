// The inner loops of transducer_loss.cpp, once an instruction set: instruction_sets.h says how.

namespace ISA {

#include "dense_kernels.h"

// exp, of 87 where x is larger; 0 below exp(-87).
KERNEL inline void probability(Floats& x) {
  const Ints below = x < -87.0f;
  x = x > 87.0f ? Floats{} + 87.0f : x;
  x = below ? Floats{} : x;
  exponential(x);
  x = below ? Floats{} : x;
}

// tanh as in Eigen: a quotient of polynomials, within 3e-7 of itself.
KERNEL inline void tangent(Floats& x) {
  constexpr float END = 7.90531110763549805f;
  x = x > END ? Floats{} + END : x;
  x = x < -END ? Floats{} - END : x;
  const Floats s = x * x;
  Floats p = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  Floats q = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  x = x * p / q;
}

// ---------------------------------------------------------------------------- cells

// tanh(encoder_out + predictor_out) of the cells s.cells[0 ... n), and their logits.
KERNEL void join(const Joiner& m, const Utterance& x, int64_t n, Scratch& s) {
  for (int64_t i = 0; i < n; ++i) {
    const float* ahead = x.encoder_out + s.cells[i] / x.width * m.joiner;
    const float* predicted = x.predictor_out + s.cells[i] % x.width * m.joiner;
    for (int64_t j = 0; j < m.joiner; j += LANES) {
      Floats sum, other;
      read(sum, ahead + j);
      read(other, predicted + j);
      sum += other;
      tangent(sum);
      write(&s.joined[i * m.joiner + j], sum);
    }
  }
  multiply(s.joined.data(), m.joiner, 1, m.weight_t, m.joiner, m.bias, s.logits.data(), m.padded, n);
}

// log(sum(exp(logits))).
KERNEL double norm_of(const float* logits, int64_t padded) {
  Floats most, x, sum{};
  read(most, logits);
  for (int64_t k = LANES; k < padded; k += LANES) {
    read(x, logits + k);
    most = x > most ? x : most;
  }
  float top = most[0];
  for (int i = 1; i < LANES; ++i) top = most[i] > top ? most[i] : top;
  for (int64_t k = 0; k < padded; k += LANES) {
    read(x, logits + k);
    x -= top;
    probability(x);
    sum += x;
  }
  double total = 0;
  for (int i = 0; i < LANES; ++i) total += sum[i];
  return top + std::log(total);
}

// Log-probabilities of blank and label in all cells.
KERNEL void log_probs(const Joiner& m, const Utterance& x, Scratch& s) {
  for (int64_t start = 0; start < x.cells(); start += TILE) {
    const int64_t n = std::min(TILE, x.cells() - start);
    for (int64_t i = 0; i < n; ++i) s.cells[i] = start + i;
    join(m, x, n, s);
    for (int64_t i = 0; i < n; ++i) {
      const float* logits = &s.logits[i * m.padded];
      const int64_t cell = start + i, u = cell % x.width;
      s.norm[cell] = norm_of(logits, m.padded);
      s.blank[cell] = logits[0] - s.norm[cell];
      s.label[cell] = u + 1 < x.width ? logits[x.targets[u]] - s.norm[cell] : -INFINITY;
    }
  }
}

// From d_logits of n cells, in s.logits, to the sums of the gradients of all that made them.
KERNEL void add_gradients(const Joiner& m, const Utterance& x, int64_t n, Scratch& s) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < m.padded; k += LANES) {
      Floats sum, d;
      read(sum, x.d_bias + k);
      read(d, &s.logits[i * m.padded + k]);
      write(x.d_bias + k, sum + d);
    }
  }
  multiply(s.logits.data(), 1, m.padded, s.joined.data(), n, nullptr, x.d_weight, m.joiner, m.tokens);
  multiply(s.logits.data(), m.padded, 1, m.weight, m.tokens, s.zeros.data(), s.d_joined.data(), m.joiner, n);
  for (int64_t i = 0; i < n; ++i) {
    float* ahead = x.d_encoder_out + s.cells[i] / x.width * m.joiner;
    float* predicted = x.d_predictor_out + s.cells[i] % x.width * m.joiner;
    for (int64_t j = 0; j < m.joiner; j += LANES) {
      Floats h, d, sum;
      read(h, &s.joined[i * m.joiner + j]);
      read(d, &s.d_joined[i * m.joiner + j]);
      d *= 1.0f - h * h;
      read(sum, ahead + j);
      write(ahead + j, sum + d);
      read(sum, predicted + j);
      write(predicted + j, sum + d);
    }
  }
}

// d_logits of a cell in place of its logits: occupied * softmax, less what goes through blank and label.
KERNEL void differentiate(const Joiner& m, const Utterance& x, const Occupied& cell, float norm, int64_t u, float* logits) {
  for (int64_t k = 0; k < m.padded; k += LANES) {
    Floats d;
    read(d, logits + k);
    d -= norm;
    probability(d);
    d *= cell.in_all;
    write(logits + k, d);
  }
  logits[0] -= cell.by_blank;
  if (u + 1 < x.width) logits[x.targets[u]] -= cell.by_label;
}

// The gradients, TILE cells at a time of those that alignments go through; joiner and logits are made again.
KERNEL void gradients(const Joiner& m, const Utterance& x, Scratch& s) {
  Occupied occupied[TILE];
  int64_t n = 0;
  for (int64_t cell = 0; cell < x.cells(); ++cell) {
    occupied[n] = s.occupied(x, cell);
    s.cells[n] = cell;
    n += !(occupied[n].in_all < LEAST);  // NaN counts
    if (n < TILE && cell + 1 < x.cells()) continue;
    join(m, x, n, s);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = s.cells[i];
      differentiate(m, x, occupied[i], static_cast<float>(s.norm[at]), at % x.width, &s.logits[i * m.padded]);
    }
    add_gradients(m, x, n, s);
    n = 0;
  }
}

constexpr Kernels KERNELS{log_probs, gradients};

}  // namespace ISA
