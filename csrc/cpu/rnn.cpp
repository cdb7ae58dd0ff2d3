// The recurrent layer on the CPU. One parallel region runs over time; each thread owns a range of hidden units and
// the panels of W_hh that make them, and all meet once a step; twice where the state is projected.
//
// The passes are in rnn_forward.h and rnn_backward.h, what both are made of in rnn_plan.h. P is how a step is multiplied
// by W_hh: see gemm.h for vectors, pair_product.h for pairs of bfloat16.

#include "rnn_backward.h"
#include "rnn_forward.h"

namespace fastlm {

#if defined(FASTLM_TILES) || defined(FASTLM_DOTS)
FASTLM_DECLARE_RNN_PAIRS(FASTLM_ISA)
#else
FASTLM_DECLARE_RNN(FASTLM_ISA)
#endif

namespace FASTLM_ISA {
namespace {

template <class P>
void forward_any(const RnnProblem& p, const RnnForward<typename P::Number>& a) {
  if (p.batch == 0) return;
  switch (p.cell) {
    case Cell::lstm: return forward<P, Cell::lstm>(p, a);
    case Cell::gru: return forward<P, Cell::gru>(p, a);
    case Cell::tanh: return forward<P, Cell::tanh>(p, a);
    case Cell::relu: return forward<P, Cell::relu>(p, a);
  }
}

template <class P, Cell cell>
void backward_cell(const RnnProblem& p, const RnnBackward<typename P::Number>& a) {
  if constexpr (P::kInPlace) {
    if (is_alone<P>(p)) return backward_alone<P, cell>(p, a);
  }
  backward<P, cell>(p, a);
}

template <class P>
void backward_any(const RnnProblem& p, const RnnBackward<typename P::Number>& a) {
  if (p.batch == 0) return;
  switch (p.cell) {
    case Cell::lstm: return backward_cell<P, Cell::lstm>(p, a);
    case Cell::gru: return backward_cell<P, Cell::gru>(p, a);
    case Cell::tanh: return backward_cell<P, Cell::tanh>(p, a);
    case Cell::relu: return backward_cell<P, Cell::relu>(p, a);
  }
}

}  // namespace

size_t rnn_workspace(const RnnProblem& p, bool backward, size_t number) {
  return number == sizeof(float) ? Workspace<Product<float>>(p, backward, nullptr).bytes()
                                 : Workspace<Product<Other>>(p, backward, nullptr).bytes();
}

void rnn_forward(const RnnProblem& p, const RnnForward<float>& a) { forward_any<Product<float>>(p, a); }
void rnn_forward(const RnnProblem& p, const RnnForward<Other>& a) { forward_any<Product<Other>>(p, a); }
void rnn_backward(const RnnProblem& p, const RnnBackward<float>& a) { backward_any<Product<float>>(p, a); }
void rnn_backward(const RnnProblem& p, const RnnBackward<Other>& a) { backward_any<Product<Other>>(p, a); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
