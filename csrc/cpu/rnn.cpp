// The recurrent layer on the CPU. One parallel region runs over time; each thread owns a range of hidden units and
// the panels of W_hh that make them, and all meet once a step.
//
// P is how a step is multiplied by W_hh, by vectors or by tiles: see gemm.h and amx.h.

#include <type_traits>

#include "../rnn.h"

#include "gemm.h"
#include "team.h"

#ifdef FASTLM_TILES
#include "amx.h"
#endif

namespace fastlm {

#ifdef FASTLM_TILES
FASTLM_DECLARE_RNN_TILES(FASTLM_ISA)
#else
FASTLM_DECLARE_RNN(FASTLM_ISA)
#endif

namespace FASTLM_ISA {
namespace {

constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// Columns of dgates, and of gates where they are kept, in units of H.
constexpr int kept_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 1; }

// One sequence needs no packed matrix where vectors multiply.
template <class P>
bool is_alone(const RnnProblem& p) {
  return P::kInPlace && p.batch == 1;
}

// The block's steps in the order of reading, or against it, with the first row of each step among all and in the block.
struct Walk {
  const RnnProblem& p;
  const bool down;
  int64_t t, row, row_in_block = 0;

  Walk(const RnnProblem& p, bool against) : p(p), down(p.reverse != against), t(0), row(0) {
    for (; t < p.first; ++t) row += rows_at(t);
    for (; down && t + 1 < p.last; ++t) row_in_block += rows_at(t);
    row += row_in_block;
  }
  int64_t rows_at(int64_t step) const { return p.batch_sizes ? p.batch_sizes[step] : p.batch; }
  int64_t rows() const { return rows_at(t); }
  bool done() const { return t < p.first || t >= p.last; }
  void next() {
    const int64_t passed = down ? (t > 0 ? -rows_at(t - 1) : 0) : rows_at(t);
    t += down ? -1 : 1;
    row += passed;
    row_in_block += passed;
  }
  // True where this step is the first of the pass.
  bool begins() const { return t == (down ? p.steps - 1 : 0); }
  // Units from u on of sequence b's state one step earlier in reading; of `initial` before the first.
  template <class T, class S>
  Vector<S> before(const T* states, const S* initial, int64_t b, int64_t u, int n) const {
    if (!p.reverse && t > 0) return load(states + (row - rows_at(t - 1) + b) * p.hidden + u, n);
    if (p.reverse && t + 1 < p.steps && b < rows_at(t + 1))
      return load(states + (row + rows() + b) * p.hidden + u, n);
    return load(initial + b * p.hidden + u, n);
  }
};

// What lies where in the workspace, each part on its own cache lines.
template <class P>
class Workspace {
  using Operand = typename P::Operand;
  using S = State<typename P::Number>;
  char* const base;
  const int threads;
  int64_t of_panels, of_operand, of_scratch, of_partial;

 public:
  Workspace(const RnnProblem& p, bool backward, void* memory) : base(static_cast<char*>(memory)), threads(p.threads) {
    const int gates = gates_of(p.cell), wide = gates * P::units(gates), lanes = kLanes<S>;
    const int64_t vectors = (p.hidden + lanes - 1) / lanes * (backward ? 1 : gates);
    const P product(p, backward ? gates * p.hidden : p.hidden);
    const auto lines = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
    of_panels = is_alone<P>(p) ? 0 : lines(vectors * product.panel_numbers() * sizeof(Operand));
    of_operand = backward && P::kInPlace ? 0 : lines(p.batch * product.ld * sizeof(Operand));
    of_scratch = lines(p.batch * (wide > kPanel ? wide : kPanel) * lanes * sizeof(S));
    of_partial = backward && is_alone<P>(p) ? lines(p.hidden * sizeof(S)) : 0;
  }
  size_t bytes() const { return of_panels + 2 * of_operand + threads * (of_scratch + 2 * of_partial); }
  Operand* panels() const { return reinterpret_cast<Operand*>(base); }
  // What all threads multiply, for steps in turn.
  Operand* operand(int turn) const { return reinterpret_cast<Operand*>(base + of_panels + turn * of_operand); }
  // Of one thread: the products of a panel, and its share of a sum, for steps in turn.
  S* scratch(int i) const { return reinterpret_cast<S*>(base + of_panels + 2 * of_operand + i * of_scratch); }
  S* partial(int turn, int i) const {
    return reinterpret_cast<S*>(base + of_panels + 2 * of_operand + threads * of_scratch +
                                (turn * threads + i) * of_partial);
  }
};

int team_size(const RnnProblem& p, int lanes) {
  const int64_t vectors = (p.hidden + lanes - 1) / lanes;
  const int64_t worthwhile = 1 + p.batch * p.hidden * p.hidden * gates_of(p.cell) / 32768;
  int64_t n = p.threads < vectors ? p.threads : vectors;
  return int(n < worthwhile ? n : worthwhile);
}

// Calls f with min(n, most) as a compile-time constant.
template <int most, class F>
void with_count(int64_t n, const F& f) {
  if constexpr (most > 1)
    if (n < most) return with_count<most - 1>(n, f);
  f(std::integral_constant<int, most>{});
}

// Calls f(u, count, next) for this member's units, in panels of `most` vectors or the `count` that are left, from
// unit u on; `next` is the unit that comes after, u at the end. Every other step runs `back`, so that it starts with
// the weights that the caches still hold.
template <int lanes, int most, class F>
void for_units(const Member& me, int64_t hidden, bool back, const F& f) {
  const int64_t vectors = (hidden + lanes - 1) / lanes, begin = me.begin(vectors), end = me.end(vectors);
  const int64_t panels = (end - begin + most - 1) / most;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t v = begin + most * (back ? panels - 1 - i : i);
    const int64_t next = i + 1 == panels ? v : back ? v - most : v + most;
    with_count<most>(end - v, [&](auto count) { f(v * lanes, count, next * lanes); });
  }
}

template <int lanes>
int lanes_left(int64_t hidden, int64_t u) {
  return hidden - u < lanes ? int(hidden - u) : lanes;
}

// --- forward ------------------------------------------------------------------------------------------------------

// Turn the products of one sequence and one vector of units, s [G vectors], into its next state.
template <class P, Cell cell>
Vector<State<typename P::Number>> forward_gates(const RnnProblem& p, const RnnForward<typename P::Number>& a,
                                                const Walk& at, int64_t b, int64_t u, int n,
                                                const State<typename P::Number>* s) {
  using T = typename P::Number;
  using S = State<T>;
  using V = Vector<S>;
  using Gate = typename P::Gate;
  constexpr int lanes = kLanes<S>;
  const int64_t H = p.hidden, row = at.row + b, block_row = at.row_in_block + b;
  S* const running = a.hn + b * H + u;
  V h;
  if constexpr (cell == Cell::lstm) {
    T* x = a.gates + block_row * 4 * H + u;
    V i = load(x, n) + load(s), f = load(x + H, n) + load(s + lanes);
    V g = load(x + 2 * H, n) + load(s + 2 * lanes), o = load(x + 3 * H, n) + load(s + 3 * lanes), c;
    S* const running_c = a.cn + b * H + u;
    lstm_forward<Math<S>>(i, f, g, o, load(running_c, n), c, h);
    store(running_c, c, n);
    if (a.train) {
      Gate* const kept = reinterpret_cast<Gate*>(x);
      store(kept, i, n);
      store(kept + H, f, n);
      store(kept + 2 * H, g, n);
      store(kept + 3 * H, o, n);
      store(a.c + row * H + u, c, n);
    }
  } else if constexpr (cell == Cell::gru) {
    T* x = a.gates + block_row * (a.train ? 4 : 3) * H + u;
    V r = load(x, n) + load(s), z = load(x + H, n) + load(s + lanes), g = load(x + 2 * H, n);
    V hn = load(s + 2 * lanes);
    if (a.b_hn) hn += load(a.b_hn + u, n);
    gru_forward<Math<S>>(r, z, g, hn, load(running, n), h);
    if (a.train) {
      Gate* const kept = reinterpret_cast<Gate*>(x);
      store(kept, r, n);
      store(kept + H, z, n);
      store(kept + 2 * H, g, n);
      store(x + 3 * H, hn, n);
    }
  } else {
    h = load(a.gates + block_row * H + u, n) + load(s);
    if constexpr (cell == Cell::tanh)
      h = Math<S>::tanh(h);
    else
      h = h < 0 ? V{} : h;
  }
  store(a.y + row * H + u, h, n);
  store(running, h, n);
  return h;
}

template <class P, Cell cell, int count>
void forward_units(const RnnProblem& p, const RnnForward<typename P::Number>& a, P& product, const Walk& at, int64_t u,
                   const typename P::Operand* panel, const typename P::Operand* next, const typename P::Operand* in,
                   typename P::Operand* out, State<typename P::Number>* scratch) {
  constexpr int G = gates_of(cell), lanes = kLanes<State<typename P::Number>>, width = G * count * lanes;
  if constexpr (P::kInPlace) {
    if (p.batch == 1)
      for (int g = 0; g < G; ++g) {
        const int64_t left = p.hidden - u, n = left < count * lanes ? left : count * lanes;
        dot_rows(a.w_hh + (g * p.hidden + u) * p.hidden, p.hidden, int(n), in, scratch + g * lanes);
      }
  }
  const auto fetch = [&](int64_t i, int64_t n) {
    const int64_t columns = (G == 3 && a.train ? 4 : G) * p.hidden;
    for (int64_t b = at.rows() * i / n; b < at.rows() * (i + 1) / n; ++b) {
      for (int g = 0; g < G; ++g) prefetch(a.gates + (at.row_in_block + b) * columns + g * p.hidden + u, count);
      prefetch_to_write(out + b * product.ld + u, count);
      prefetch_to_write(a.y + (at.row + b) * p.hidden + u, count);
      if (cell == Cell::lstm && a.train) prefetch_to_write(a.c + (at.row + b) * p.hidden + u, count);
    }
  };
  if (!is_alone<P>(p)) product.template multiply<G * count>(in, product.ld, at.rows(), panel, next, scratch, fetch);
  for (int64_t b = 0; b < at.rows(); ++b)
    for (int j = 0; j < count; ++j) {
      const int64_t v = u + j * lanes;
      const int n = lanes_left<lanes>(p.hidden, v);
      const auto h = forward_gates<P, cell>(p, a, at, b, v, n, scratch + b * width + j * G * lanes);
      product.put(out + b * product.ld, v, h, n);
    }
}

template <class P, Cell cell>
void forward(const RnnProblem& p, const RnnForward<typename P::Number>& a) {
  using S = State<typename P::Number>;
  constexpr int G = gates_of(cell), lanes = kLanes<S>, most = P::units(G);
  const Workspace<P> space(p, false, a.workspace);
  const int64_t H = p.hidden;
  parallel(team_size(p, lanes), [&](Member& me) {
    P product(p, H);
    S* const scratch = space.scratch(me.index);
    const auto panel_of = [&](int64_t u) { return space.panels() + u / lanes * G * product.panel_numbers(); };
    Walk at(p, false);
    for (int turn = 0; turn < 2; ++turn)
      for (int64_t b = me.begin(p.batch); b < me.end(p.batch); ++b) product.pad(space.operand(turn) + b * product.ld);
    for_units<lanes, most>(me, H, false, [&](int64_t u, auto count, int64_t) {
      if (!is_alone<P>(p) && at.begins()) product.template pack_gates<G, count>(a.w_hh, H, u, panel_of(u));
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t v = u; v < u + count * lanes && v < H; v += lanes) {
          const int n = lanes_left<lanes>(H, v);
          if (at.begins()) store(a.hn + b * H + v, load(a.h0 + b * H + v, n), n);
          if (at.begins() && cell == Cell::lstm) store(a.cn + b * H + v, load(a.c0 + b * H + v, n), n);
          // Both operands: a sequence read backwards joins late, whichever of the two is then its turn.
          for (int turn = 0; turn < 2; ++turn)
            product.put(space.operand(turn) + b * product.ld, v, load(a.hn + b * H + v, n), n);
        }
    });
    me.meet();
    int turn = 0;
    for (bool back = true; !at.done(); at.next(), back = !back, turn ^= 1) {
      for_units<lanes, most>(me, H, back, [&](int64_t u, auto count, int64_t next) {
        forward_units<P, cell, count>(p, a, product, at, u, panel_of(u), panel_of(next), space.operand(turn),
                                      space.operand(turn ^ 1), scratch);
      });
      me.meet();
    }
  });
}

// --- backward -----------------------------------------------------------------------------------------------------

// Turn the gradient of one sequence's state, one vector of units, into those of its gates and what passes them by.
template <class P, Cell cell>
void backward_gates(const RnnProblem& p, const RnnBackward<typename P::Number>& a, const P& product, const Walk& at,
                    int64_t b, int64_t u, int n, typename P::Operand* operand) {
  using T = typename P::Number;
  using S = State<T>;
  using V = Vector<S>;
  const int64_t H = p.hidden, row = at.row + b, block_row = at.row_in_block + b;
  S* const carried = a.dh0 + b * H + u;
  T* const d = a.dgates + block_row * a.ld + u;
  V dh = load(carried, n) + load(a.dy + row * H + u, n);
  const T* const x = a.gates + block_row * 4 * H + u;
  const auto* const kept = reinterpret_cast<const typename P::Gate*>(x);
  // Gate k of those that U h goes into.
  const auto hand_back = [&](int k, const V& dx) {
    if constexpr (!P::kInPlace) product.put(operand + b * product.ld, k * H + u, dx, n);
  };
  if constexpr (cell == Cell::lstm) {
    V i = load(kept, n), f = load(kept + H, n), g = load(kept + 2 * H, n), o = load(kept + 3 * H, n);
    S* const carried_c = a.dc0 + b * H + u;
    V dc = load(carried_c, n);
    lstm_backward<Math<S>>(i, f, g, o, load(a.c + row * H + u, n), at.before(a.c, a.c0, b, u, n), dh, dc);
    store(carried_c, dc, n);
    store(carried, V{}, n);
    const V all[] = {i, f, g, o};
    for (int k = 0; k < 4; ++k) {
      store(d + k * H, all[k], n);
      hand_back(k, all[k]);
    }
  } else if constexpr (cell == Cell::gru) {
    V r = load(kept, n), z = load(kept + H, n), g = load(kept + 2 * H, n), hn = load(x + 3 * H, n);
    gru_backward<Math<S>>(r, z, g, hn, at.before(a.y, a.h0, b, u, n), dh);
    store(carried, dh, n);
    const V all[] = {g, r, z, hn};
    for (int k = 0; k < 4; ++k) store(d + k * H, all[k], n);
    for (int k = 0; k < 3; ++k) hand_back(k, all[k + 1]);
  } else {
    const V h = load(a.y + row * H + u, n);
    const V dx = cell == Cell::tanh ? dh * (1 - h * h) : h <= 0 ? V{} : dh;
    store(carried, V{}, n);
    store(d, dx, n);
    hand_back(0, dx);
  }
}

// dh0 [rows, count vectors from u on] += what the gates of the step visited before, d, hand back
template <class P, int count>
void backward_product(const RnnProblem& p, const RnnBackward<typename P::Number>& a, P& product, int64_t u,
                      const typename P::Operand* panel, const typename P::Operand* next, const typename P::Operand* d,
                      int64_t rows, State<typename P::Number>* scratch) {
  constexpr int lanes = kLanes<State<typename P::Number>>;
  if (rows == 0) return;
  product.template multiply<count>(d, P::kInPlace ? a.ld : product.ld, rows, panel, next, scratch,
                                   [](int64_t, int64_t) {});
  for (int64_t b = 0; b < rows; ++b)
    for (int j = 0; j < count; ++j) {
      const int n = lanes_left<lanes>(p.hidden, u + j * lanes);
      auto* const to = a.dh0 + b * p.hidden + u + j * lanes;
      store(to, load(to, n) + load(scratch + (b * count + j) * lanes), n);
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
  const int64_t H = p.hidden, depth = G * H;
  parallel(team_size(p, lanes), [&](Member& me) {
    P product(p, depth);
    S* const scratch = space.scratch(me.index);
    const auto panel_of = [&](int64_t u) { return space.panels() + u / lanes * product.panel_numbers(); };
    Walk at(p, true);
    if constexpr (!P::kInPlace)
      for (int turn = 0; turn < 2; ++turn)
        for (int64_t b = me.begin(p.batch); b < me.end(p.batch); ++b) product.pad(space.operand(turn) + b * product.ld);
    if (at.begins())
      for_units<lanes, most>(me, H, false, [&](int64_t u, auto count, int64_t) {
        const int64_t n = H - u < count * lanes ? H - u : count * lanes;
        product.template pack_units<count>(a.w_hh, H, u, n, panel_of(u));
        for (int64_t b = 0; b < p.batch; ++b) {
          std::memcpy(a.dh0 + b * H + u, a.dhn + b * H + u, n * sizeof(S));
          if (cell == Cell::lstm) std::memcpy(a.dc0 + b * H + u, a.dcn + b * H + u, n * sizeof(S));
        }
      });
    const typename P::Operand* d = nullptr;  // of the step visited before, and its rows
    int64_t visited = 0;
    int turn = 0;
    bool back = true;
    const auto add_product = [&](int64_t u, auto count, int64_t next) {
      backward_product<P, count>(p, a, product, u, panel_of(u), panel_of(next), d, visited, scratch);
    };
    for (; !at.done(); at.next(), back = !back, turn ^= 1) {
      for_units<lanes, most>(me, H, back, [&](int64_t u, auto count, int64_t next) {
        add_product(u, count, next);
        for (int64_t b = 0; b < at.rows(); ++b)
          for (int64_t v = u; v < u + count * lanes && v < H; v += lanes)
            backward_gates<P, cell>(p, a, product, at, b, v, lanes_left<lanes>(H, v), space.operand(turn));
      });
      me.meet();
      if constexpr (P::kInPlace)
        d = hidden_part<typename P::Number, cell>(p, a, at);
      else
        d = space.operand(turn);
      visited = at.rows();
    }
    for_units<lanes, most>(me, H, back, add_product);
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
  const int64_t H = p.hidden, vectors = (H + lanes - 1) / lanes;
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
      for (int64_t u = u0; u < u1; u += lanes)
        backward_gates<P, cell>(p, a, product, at, 0, u, lanes_left<lanes>(H, u), nullptr);
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
    if (p.batch == 1) return backward_alone<P, cell>(p, a);
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

#ifdef FASTLM_TILES
template <class T>
using Product = TileProduct<T>;
using Other = Bf16;
#else
template <class T>
using Product = VectorProduct<T>;
using Other = double;
#endif

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
