// The backward pass: at each step every thread multiplies the gradients of the gates by its panels of W_hh, and turns
// the product into the gradients of the gates before.
#pragma once

#include "rnn_plan.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Turn the gradient of one sequence's state before projection, one vector of units, into those of its gates, and dh
// into what passes them by; add those of the gates to sums.
template <class P, Cell cell>
FASTLM_INLINE void backward_gates(const RnnProblem& p, const RnnBackward<typename P::Number>& a, const P& product, const Walk& at,
                    int64_t b, int64_t u, int n, typename P::Operand* operand,
                    Vector<State<typename P::Number>>& dh, Vector<State<typename P::Number>>* sums) {
  using T = typename P::Number;
  using S = State<T>;
  using V = Vector<S>;
  const int64_t H = p.hidden, row = at.row + b, block_row = at.row_in_block + b;
  T* const d = a.dgates + block_row * a.ld + u;
  const T* const x = a.gates + block_row * a.ld_gates + u;
  const auto* const kept = reinterpret_cast<const typename P::Gate*>(x);
  // Gate k of those that U h goes into.
  const auto hand_back = [&](int k, const V& dx) FASTLM_INLINED {
    if constexpr (!P::kInPlace) product.put(product.row(operand, b), k * H + u, dx, n);
  };
  if constexpr (cell == Cell::lstm) {
    V i = load(kept, n), f = load(kept + H, n), g = load(kept + 2 * H, n), o = load(kept + 3 * H, n);
    S* const carried_c = a.dc0 + b * H + u;
    V dc = load(carried_c, n);
    lstm_backward<typename P::Functions>(i, f, g, o, load(a.c + row * H + u, n), at.before(a.c, a.c0, b, u, n), dh, dc);
    store(carried_c, dc, n);
    dh = V{};
    const V all[] = {i, f, g, o};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      store(d + k * H, all[k], n);
      hand_back(k, all[k]);
      sums[k] += all[k];
    }
  } else if constexpr (cell == Cell::gru) {
    V r = load(kept, n), z = load(kept + H, n), g = load(kept + 2 * H, n), hn = load(x + 3 * H, n);
    gru_backward<typename P::Functions>(r, z, g, hn, at.before(a.y, a.h0, b, u, n), dh);
    constexpr bool as_w = sizeof(T) == 2;  // in the order of W_ih's rows
    const V all[] = {as_w ? r : g, as_w ? z : r, as_w ? g : z, hn};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      store(d + k * H, all[k], n);
      sums[k] += all[k];
    }
    hand_back(0, r);
    hand_back(1, z);
    hand_back(2, hn);
  } else {
    const V h = load(a.y + row * H + u, n);
    const V dx = cell == Cell::tanh ? dh * (1 - h * h) : h <= 0 ? V{} : dh;
    dh = V{};
    store(d, dx, n);
    hand_back(0, dx);
    sums[0] += dx;
  }
}

// The gradient of one sequence's h, one vector of it: what its result and the steps visited before hand back.
template <class P>
FASTLM_INLINE Vector<State<typename P::Number>> gradient_of_state(const RnnProblem& p, const RnnBackward<typename P::Number>& a,
                                                    const Walk& at, int64_t b, int64_t u, int n) {
  return load(a.dh0 + b * p.out() + u, n) + load(a.dy + (at.row + b) * p.out() + u, n);
}

// Fetch what backward_state will need of n units from u on.
template <class P, Cell cell>
void fetch_backward(const RnnProblem& p, const RnnBackward<typename P::Number>& a, const P& product, const Walk& at,
                    int64_t b, int64_t u, int n, typename P::Operand* operand) {
  constexpr int G = gates_of(cell), kept = kept_of(cell);
  const int64_t H = p.hidden, row = at.row + b, block_row = at.row_in_block + b;
  prefetch(a.dy + row * H + u, n);
  for (int k = 0; k < kept; ++k) {
    if (kept > 1 && a.gates != a.dgates) prefetch(a.gates + block_row * a.ld_gates + k * H + u, n);
    prefetch_to_write(a.dgates + block_row * a.ld + k * H + u, n);
  }
  for (int k = 0; k < G; ++k) product.prefetch_row(product.row(operand, b), k * H + u, n);
  if (cell != Cell::lstm) return prefetch(a.y + row * H + u, n);
  prefetch(a.c + row * H + u, n);
}

constexpr int64_t kSumSteps = 32;  // that are summed before they are added to all before: one long sum loses digits

// The sums in db, n units from u on of each column of dgates, += sums of one step
template <Cell cell, class T>
void add_sums(const RnnProblem& p, const RnnBackward<T>& a, const Walk& at, int64_t u, int n,
              const Vector<State<T>>* sums) {
  constexpr int columns = kept_of(cell);
  for (int k = 0; k < columns; ++k) {
    State<T>* const recent = a.db + k * p.hidden + u;
    State<T>* const earlier = recent + columns * p.hidden;
    Vector<State<T>> sum = load(recent, n) + sums[k];
    if (at.t % kSumSteps == 0) {
      store(earlier, load(earlier, n) + sum, n);
      sum = Vector<State<T>>{};
    }
    store(recent, sum, n);
  }
}

template <class P, Cell cell>
FASTLM_INLINE void backward_state(const RnnProblem& p, const RnnBackward<typename P::Number>& a, const P& product, const Walk& at,
                    int64_t b, int64_t u, int n, typename P::Operand* operand,
                    Vector<State<typename P::Number>>* sums) {
  auto dh = gradient_of_state<P>(p, a, at, b, u, n);
  backward_gates<P, cell>(p, a, product, at, b, u, n, operand, dh, sums);
  store(a.dh0 + b * p.hidden + u, dh, n);
}

// dh0 [rows, count vectors from u on] += what the gates of the step visited before, d, hand back
template <class P, int count, class Fetch>
void backward_product(const RnnProblem& p, const RnnBackward<typename P::Number>& a, const P& product, int64_t u,
                      const typename P::Operand* panel, const typename P::Operand* next, const typename P::Operand* d,
                      int64_t rows, State<typename P::Number>* scratch, const Fetch& fetch) {
  constexpr int lanes = kLanes<State<typename P::Number>>;
  if (rows == 0) return;
  product.template multiply<count>(P::kInPlace ? product.rows_at(d, a.ld) : product.rows_of(d), rows, panel, next, scratch,
                                   fetch);
  for (int64_t b = 0; b < rows; ++b)
    for (int j = 0; j < count; ++j) {
      const int n = lanes_left<lanes>(p.out(), u + j * lanes);
      auto* const to = a.dh0 + b * p.out() + u + j * lanes;
      store(to, load(to, n) + load(scratch + (b * count + j) * lanes), n);
    }
}

// Gradients of gates [rows, count vectors from u on], from that of h, projected back: dh · W_hr.
template <class P, int count>
void backward_projection(const RnnProblem& p, const RnnBackward<typename P::Number>& a, const P& product,
                         const P& second, const Walk& at, int64_t u, const typename P::Operand* panel,
                         const typename P::Operand* next, const typename P::Operand* dh, typename P::Operand* operand,
                         State<typename P::Number>* scratch) {
  using S = State<typename P::Number>;
  constexpr int lanes = kLanes<S>;
  const int64_t H = p.hidden;
  second.template multiply<count>(P::kInPlace ? second.rows_at(dh, a.ld) : second.rows_of(dh), at.rows(), panel, next,
                                  scratch, [](int64_t, int64_t) {});
  for (int j = 0; j < count; ++j) {
    const int64_t v = u + j * lanes;
    const int n = lanes_left<lanes>(H, v);
    Vector<S> sums[4] = {};
    for (int64_t b = 0; b < at.rows(); ++b) {
      const int64_t block_row = at.row_in_block + b;
      const auto* const kept = reinterpret_cast<const typename P::Gate*>(a.gates + block_row * a.ld_gates + v);
      store(a.dgates + block_row * a.ld + 4 * H + p.projection + v,
            load(kept + 3 * H, n) * P::Functions::tanh(load(a.c + (at.row + b) * H + v, n)), n);
      Vector<S> dm = load(scratch + (b * count + j) * lanes);
      backward_gates<P, Cell::lstm>(p, a, product, at, b, v, n, operand, dm, sums);
    }
    add_sums<Cell::lstm>(p, a, at, v, n, sums);
  }
}

// The columns of dgates that belong to U h: all, but for GRU's first.
template <class T, Cell cell>
const T* hidden_part(const RnnProblem& p, const RnnBackward<T>& a, const Walk& at) {
  return a.dgates + at.row_in_block * a.ld + (cell == Cell::gru ? p.hidden : 0);
}

template <class P, Cell cell>
void backward(const RnnProblem& p, const RnnBackward<typename P::Number>& a) {
  using S = State<typename P::Number>;
  constexpr int G = gates_of(cell), lanes = kLanes<S>, most = kPanel;
  const Workspace<P> space(p, true, a.workspace);
  const int64_t H = p.hidden, out = p.out();
  const bool projects = cell == Cell::lstm && p.projection;
  Paces paces;
  parallel(team_size(p, lanes), [&](Member& me) {
    Shares shares(me, paces, Panels<P, most>(out, me.count).count);
    typename P::Registers registers;
    const P product(p, G * H, &registers), second(p, out, &registers);
    S* const scratch = space.scratch(me.index);
    const auto panel_of = [&](int64_t u) { return space.panels() + u / lanes * product.panel_numbers(); };
    const auto second_panel_of = [&](int64_t u) { return space.projection() + u / lanes * second.panel_numbers(); };
    Walk at(p, true);
    if constexpr (!P::kInPlace)
      for (int64_t b = me.begin(p.batch); b < me.end(p.batch); ++b) {
        for (int turn = 0; turn < 2; ++turn) product.pad(product.row(space.operand(turn), b));
        if (projects) second.pad(second.row(space.projected(), b));
      }
    if (at.begins()) {
      for_units<P, most>(shares, out, false, [&](int64_t u, auto count, int64_t) {
        const int64_t n = out - u < count * lanes ? out - u : count * lanes;
        product.template pack_units<count>(a.w_hh, out, u, n, panel_of(u));
        for (int64_t b = 0; b < p.batch; ++b) std::memcpy(a.dh0 + b * out + u, a.dhn + b * out + u, n * sizeof(S));
      });
      if (cell == Cell::lstm)
        for_units<P, most>(shares, H, false, [&](int64_t u, auto count, int64_t) {
          const int64_t n = H - u < count * lanes ? H - u : count * lanes;
          if (projects) second.template pack_units<count>(a.w_hr, H, u, n, second_panel_of(u));
          for (int64_t b = 0; b < p.batch; ++b) std::memcpy(a.dc0 + b * H + u, a.dcn + b * H + u, n * sizeof(S));
        });
    }
    const typename P::Operand* d = nullptr;  // of the step visited before, and its rows
    int64_t visited = 0;
    int turn = 0;
    bool back = true;
    const auto add_product = [&](int64_t u, auto count, int64_t next) {
      backward_product<P, count>(p, a, product, u, panel_of(u), panel_of(next), d, visited, scratch,
                                 [&](int64_t i, int64_t n) {
        if (P::kInPlace || projects || at.done()) return;
        for (int64_t b = at.rows() * i / n; b < at.rows() * (i + 1) / n; ++b)
          fetch_backward<P, cell>(p, a, product, at, b, u, count * lanes, space.operand(turn));
      });
    };
    for (; !at.done(); at.next(), back = !back, turn ^= 1) {
      auto* const dh_rows = a.dgates + at.row_in_block * a.ld + G * H;  // of a projection
      for_units<P, most>(shares, out, back, [&](int64_t u, auto count, int64_t next) {
        add_product(u, count, next);
        for (int64_t v = u; v < u + count * lanes && v < out; v += lanes) {
          const int left = lanes_left<lanes>(out, v);
          const auto make = [&](int n) FASTLM_INLINED {
            Vector<S> sums[kept_of(cell)] = {};
            for (int64_t b = 0; b < at.rows(); ++b) {
              if (!projects) {
                backward_state<P, cell>(p, a, product, at, b, v, n, space.operand(turn), sums);
                continue;
              }
              const auto dh = gradient_of_state<P>(p, a, at, b, v, n);
              store(dh_rows + b * a.ld + v, dh, n);
              if constexpr (!P::kInPlace) second.put(second.row(space.projected(), b), v, dh, n);
              store(a.dh0 + b * out + v, Vector<S>{}, n);
            }
            if (!projects) add_sums<cell>(p, a, at, v, n, sums);
          };
          left == lanes ? make(lanes) : make(left);
        }
      });
      shares.meet();
      if (projects) {
        const typename P::Operand* dh;
        if constexpr (P::kInPlace)
          dh = dh_rows;
        else
          dh = space.projected();
        for_units<P, most>(shares, H, back, [&](int64_t u, auto count, int64_t next) {
          backward_projection<P, count>(p, a, product, second, at, u, second_panel_of(u), second_panel_of(next), dh,
                                        space.operand(turn), scratch);
        });
        shares.meet();
      }
      if constexpr (P::kInPlace)
        d = hidden_part<typename P::Number, cell>(p, a, at);
      else
        d = space.operand(turn);
      visited = at.rows();
    }
    for_units<P, most>(shares, out, back, add_product);
  });
}

// One sequence: W_hh is read in place, row by row. Each thread multiplies the rows of its own units' gates and all
// add up the partial sums for their units after the meeting.
template <class P, Cell cell>
void backward_alone(const RnnProblem& p, const RnnBackward<typename P::Number>& a) {
  using T = typename P::Number;
  constexpr int G = gates_of(cell), lanes = kLanes<T>;
  const Workspace<P> space(p, true, a.workspace);
  const P product(p, G * p.hidden);
  const int64_t H = p.hidden, vectors = vectors_in(H, lanes);
  if (Walk(p, true).begins()) {
    std::memcpy(a.dh0, a.dhn, H * sizeof(T));
    if (cell == Cell::lstm) std::memcpy(a.dc0, a.dcn, H * sizeof(T));
  }
  parallel(team_size(p, lanes), [&](Member& me) {
    const int64_t u0 = me.begin(vectors) * lanes, last = me.end(vectors) * lanes, u1 = last < H ? last : H;
    int turn = 0;
    const auto collect = [&] {
      for (int64_t u = u0; u < u1; u += lanes) {
        const int n = lanes_left<lanes>(H, u);
        Vector<T> total = load(a.dh0 + u, n);
        for (int i = 0; i < me.count; ++i) total += load(space.partial(turn, i) + u, n);
        store(a.dh0 + u, total, n);
      }
    };
    for (Walk at(p, true); !at.done(); at.next(), turn ^= 1) {
      for (int64_t u = u0; u < u1; u += lanes) {
        Vector<T> sums[kept_of(cell)] = {};
        const int n = lanes_left<lanes>(H, u);
        backward_state<P, cell>(p, a, product, at, 0, u, n, nullptr, sums);
        add_sums<cell>(p, a, at, u, n, sums);
      }
      T* const mine = space.partial(turn, me.index);
      std::memset(mine, 0, H * sizeof(T));
      const T* const d = hidden_part<T, cell>(p, a, at);
      for (int i = 0; i < G; ++i) {
        const int g = turn ? G - 1 - i : i;
        add_rows(a.w_hh + (g * H + u0) * H, H, int(u1 - u0), turn, d + g * H + u0, mine);
      }
      me.meet();
      collect();
    }
  });
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
