// The cells' formulas, one number or one vector at a time, for CPU and CUDA alike.
// M gives M::sigmoid and M::tanh for V, which is float, double or a vector of them.
#pragma once

#ifdef __CUDACC__
#define FASTLM_INLINE __host__ __device__ __forceinline__
#else
#define FASTLM_INLINE static inline __attribute__((always_inline))
#endif

namespace fastlm {

// In: pre-activations i f g o. Out: the gates; c and h of this step.
template <class M, class V>
FASTLM_INLINE void lstm_forward(V& i, V& f, V& g, V& o, const V& c_prev, V& c, V& h) {
  i = M::sigmoid(i);
  f = M::sigmoid(f);
  g = M::tanh(g);
  o = M::sigmoid(o);
  c = f * c_prev + i * g;
  h = o * M::tanh(c);
}

// In: gates, c, c_prev; dh and dc reach h and c of this step. Out: gradients of the pre-activations in place of the
// gates, dc of the step before.
template <class M, class V>
FASTLM_INLINE void lstm_backward(V& i, V& f, V& g, V& o, const V& c, const V& c_prev, const V& dh, V& dc) {
  const V tanh_c = M::tanh(c);
  const V d = dc + dh * o * (1 - tanh_c * tanh_c);
  dc = d * f;
  o = dh * tanh_c * o * (1 - o);
  f = d * c_prev * f * (1 - f);
  const V di = d * g * i * (1 - i);
  g = d * i * (1 - g * g);
  i = di;
}

// In: pre-activations r z (both sides summed), W x of n in n, U h + b of n in hn. Out: the gates and h.
template <class M, class V>
FASTLM_INLINE void gru_forward(V& r, V& z, V& n, const V& hn, const V& h_prev, V& h) {
  r = M::sigmoid(r);
  z = M::sigmoid(z);
  n = M::tanh(n + r * hn);
  h = n + z * (h_prev - n);
}

// In: gates and hn; dh reaches h of this step. Out: gradients of the pre-activations in place of r z n and hn, and
// what reaches the step before directly, past the gates, in dh.
template <class M, class V>
FASTLM_INLINE void gru_backward(V& r, V& z, V& n, V& hn, const V& h_prev, V& dh) {
  const V dn = dh * (1 - z) * (1 - n * n);
  const V dz = dh * (h_prev - n) * z * (1 - z);
  const V dr = dn * hn * r * (1 - r);
  dh = dh * z;
  hn = dn * r;
  n = dn;
  z = dz;
  r = dr;
}

}  // namespace fastlm
