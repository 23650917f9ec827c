// exp of a vector, in sparse_kernels.h and dense_kernels.h: instruction_sets.h says how.

// y = exp(y), y from -87 to 87; as in Cephes: a power of 2 times a polynomial.
KERNEL inline void exponential(Floats& y) {
  const Floats shifted = y * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its last bits hold the rounded exponent
  const Floats n = shifted - 12582912.0f, f = y - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  y = p * (Floats)(((Ints)shifted << 23) + 0x3f800000);
}

// y = 1 / y, y from 1 to 1e38; to float32's rounding. (A division of sixteen takes 16 cycles on an Intel Xeon.)
KERNEL inline void reciprocal(Floats& y) {
#if defined(__x86_64__) && LANES == 16
  const Floats near = (Floats)_mm512_rcp14_ps((__m512)y);
  y = near * (2.0f - y * near);
#else
  y = 1.0f / y;
#endif
}

// 1 / (1 + exp(-x)), within 2e-7.
KERNEL inline void sigmoid(Floats& x) {
  Floats y = -x;
  y = y > 87.0f ? Floats{} + 87.0f : y;
  y = y < -87.0f ? Floats{} - 87.0f : y;
  exponential(y);
  x = 1.0f + y;
  reciprocal(x);
}
