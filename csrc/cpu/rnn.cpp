// The recurrent layer on the CPU. One parallel region runs over time; each thread owns a range of hidden units and
// the panels of W_hh that make them, and all meet once a step; twice where the state is projected.
//
// P is how a step is multiplied by W_hh: see gemm.h for vectors, pairs.h for pairs of bfloat16.

#include "../rnn.h"

#include "gemm.h"
#include "team.h"

#if defined(FASTLM_TILES)
#include "amx.h"
#elif defined(FASTLM_DOTS)
#include "dots.h"
#endif

namespace fastlm {

#if defined(FASTLM_TILES) || defined(FASTLM_DOTS)
FASTLM_DECLARE_RNN_PAIRS(FASTLM_ISA)
#else
FASTLM_DECLARE_RNN(FASTLM_ISA)
#endif

namespace FASTLM_ISA {
namespace {

constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// Columns of dgates, and of gates where they are kept, in units of H.
constexpr int kept_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 1; }

// The backward pass of one sequence needs no packed matrix where vectors multiply.
template <class P>
bool is_alone(const RnnProblem& p) {
  return P::kInPlace && p.batch == 1 && !p.projection;
}

constexpr int64_t vectors_in(int64_t units, int lanes) { return (units + lanes - 1) / lanes; }

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

// Steps whose products with x are made at once: a panel that is read pays off with some tens of rows.
int64_t steps_ahead(const RnnProblem& p) { return p.batch < 1 || p.batch > 64 ? 1 : 64 / p.batch; }

// What lies where in the workspace, each part on its own cache lines.
template <class P>
class Workspace {
  using Operand = typename P::Operand;
  using S = State<typename P::Number>;
  char* const base;
  const int threads;
  int64_t of_panels, of_operand, of_projection = 0, of_projected = 0, of_inputs = 0, of_ahead = 0, of_scratch, of_partial;

 public:
  Workspace(const RnnProblem& p, bool backward, void* memory) : base(static_cast<char*>(memory)), threads(p.threads) {
    const int gates = gates_of(p.cell), wide = gates * P::units(gates), lanes = kLanes<S>;
    const int64_t vectors = backward ? vectors_in(p.out(), lanes) : vectors_in(p.hidden, lanes) * gates;
    const P product(p, backward ? gates * p.hidden : p.out());
    const auto lines = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
    of_panels = backward && is_alone<P>(p) ? 0 : lines(vectors * product.panel_numbers() * sizeof(Operand));
    of_operand = backward && P::kInPlace ? 0 : lines(p.batch * product.ld * sizeof(Operand));
    if (p.projection) {
      const P second(p, backward ? p.projection : p.hidden);
      const int64_t columns = vectors_in(backward ? p.hidden : p.projection, lanes);
      of_projection = lines(columns * second.panel_numbers() * sizeof(Operand));
      of_projected = backward && P::kInPlace ? 0 : lines(p.batch * second.ld * sizeof(Operand));
    }
    if (P::kTakesX && !backward) {
      of_inputs = lines(vectors * P(p, p.inputs).panel_numbers() * sizeof(Operand));
      of_ahead = lines(vectors * lanes * steps_ahead(p) * p.batch * sizeof(S));
    }
    of_scratch = lines(p.batch * (wide > kPanel ? wide : kPanel) * lanes * sizeof(S));
    of_partial = backward && is_alone<P>(p) ? lines(p.hidden * sizeof(S)) : 0;
  }
  size_t bytes() const { return shared() + threads * (of_scratch + 2 * of_partial); }
  Operand* panels() const { return reinterpret_cast<Operand*>(base); }
  // What all threads multiply by W_hh, for steps in turn.
  Operand* operand(int turn) const { return reinterpret_cast<Operand*>(base + of_panels + turn * of_operand); }
  // W_hr, and what all threads multiply by it.
  Operand* projection() const { return operand(2); }
  Operand* projected() const { return reinterpret_cast<Operand*>(base + of_panels + 2 * of_operand + of_projection); }
  // W_ih, and the products with it of the steps that come next.
  Operand* inputs() const { return reinterpret_cast<Operand*>(base + shared() - of_inputs - of_ahead); }
  S* ahead() const { return reinterpret_cast<S*>(base + shared() - of_ahead); }
  // Of one thread: the products of a panel, and its share of a sum, for steps in turn.
  S* scratch(int i) const { return reinterpret_cast<S*>(base + shared() + i * of_scratch); }
  S* partial(int turn, int i) const {
    return reinterpret_cast<S*>(base + shared() + threads * of_scratch + (turn * threads + i) * of_partial);
  }

 private:
  int64_t shared() const { return of_panels + 2 * of_operand + of_projection + of_projected + of_inputs + of_ahead; }
};

int team_size(const RnnProblem& p, int lanes) {
  const int64_t vectors = vectors_in(p.hidden, lanes);
  const int64_t worthwhile = 1 + p.batch * p.hidden * p.out() * gates_of(p.cell) / 32768;
  int64_t n = p.threads < vectors ? p.threads : vectors;
  return int(n < worthwhile ? n : worthwhile);
}

// Calls f(u, count, next) for this member's share of `units`, in panels of `most` vectors or the `count` that are
// left, from unit u on; `next` is the unit that comes after, u at the end. Every other step runs `back`, so that it
// starts with the weights that the caches still hold.
template <int lanes, int most, class F>
void for_units(const Member& me, int64_t units, bool back, const F& f) {
  const int64_t vectors = vectors_in(units, lanes), begin = me.begin(vectors), end = me.end(vectors);
  const int64_t panels = (end - begin + most - 1) / most;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t v = begin + most * (back ? panels - 1 - i : i);
    const int64_t next = i + 1 == panels ? v : back ? v - most : v + most;
    with_count<most>(end - v, [&](auto count) { f(v * lanes, count, next * lanes); });
  }
}

template <int lanes>
int lanes_left(int64_t units, int64_t u) {
  return units - u < lanes ? int(units - u) : lanes;
}

// --- forward ------------------------------------------------------------------------------------------------------

// The products with x that P makes itself, in float32: of this step and of those that come next, for a member's units.
template <class P, Cell cell>
class Inputs {
  using Operand = typename P::Operand;
  using S = State<typename P::Number>;
  static constexpr int G = gates_of(cell), lanes = kLanes<S>;
  const RnnProblem& p;
  const RnnForward<typename P::Number>& a;
  const P product;
  Operand* const panels;
  S* const made;  // for each panel of units [rows, G·count vectors]
  int64_t first = 0, left = 0;

  Operand* panel(int64_t u) const { return panels + u / lanes * G * product.panel_numbers(); }
  S* products(int64_t u) const { return made + u * G * steps_ahead(p) * p.batch; }

 public:
  Inputs(const RnnProblem& p, const RnnForward<typename P::Number>& a, const Workspace<P>& space,
         typename P::Registers* registers)
      : p(p), a(a), product(p, p.inputs, registers), panels(space.inputs()), made(space.ahead()) {}

  template <int count>
  void pack(int64_t u) const {
    if constexpr (P::kTakesX) product.template pack_gates<G, count>(a.w_ih, p.hidden, u, panel(u));
  }
  // Have the products of the step at hand.
  void make(const Member& me, const Walk& at) {
    if constexpr (P::kTakesX) {
      if (left-- > 0) return;
      left = steps_ahead(p) - 1;
      int64_t end = at.row + at.rows();
      first = at.row;
      Walk later = at;
      for (int64_t i = 0; i < left && (later.next(), !later.done()); ++i) {
        first = later.row < first ? later.row : first;
        end = later.row + later.rows() > end ? later.row + later.rows() : end;
      }
      for_units<lanes, P::units(G)>(me, p.hidden, false, [&](int64_t u, auto count, int64_t next) {
        product.template multiply<G * count>(a.x + first * product.padded, product.padded, end - first, panel(u),
                                             panel(next), products(u), [](int64_t, int64_t) {});
      });
    }
  }
  // Those of one row and the j-th vector of a panel's units, [G vectors].
  template <int count>
  const S* of(int64_t row, int64_t u, int j) const {
    return P::kTakesX ? products(u) + ((row - first) * count + j) * G * lanes : nullptr;
  }
};

// Turn the products of one sequence and one vector of units, s [G vectors] with h and x with x where P makes them, into
// its next state h, not projected.
template <class P, Cell cell>
Vector<State<typename P::Number>> forward_gates(const RnnProblem& p, const RnnForward<typename P::Number>& a,
                                                const Walk& at, int64_t b, int64_t u, int n,
                                                const State<typename P::Number>* s,
                                                const State<typename P::Number>* x) {
  using T = typename P::Number;
  using S = State<T>;
  using V = Vector<S>;
  using Gate = typename P::Gate;
  constexpr int lanes = kLanes<S>;
  const int64_t H = p.hidden, block_row = at.row_in_block + b;
  T* const row = a.gates ? a.gates + block_row * a.ld + u : nullptr;
  Gate* const kept = reinterpret_cast<Gate*>(row);
  const auto of_x = [&](int g) {
    if constexpr (!P::kTakesX) return load(row + g * H, n);
    return a.bias ? load(x + g * lanes) + load(a.bias + g * H + u, n) : load(x + g * lanes);
  };
  V h;
  if constexpr (cell == Cell::lstm) {
    V i = of_x(0) + load(s), f = of_x(1) + load(s + lanes);
    V g = of_x(2) + load(s + 2 * lanes), o = of_x(3) + load(s + 3 * lanes), c;
    S* const running_c = a.cn + b * H + u;
    lstm_forward<typename P::Functions>(i, f, g, o, load(running_c, n), c, h);
    store(running_c, c, n);
    if (a.train) {
      store(kept, i, n);
      store(kept + H, f, n);
      store(kept + 2 * H, g, n);
      store(kept + 3 * H, o, n);
      store(a.c + (at.row + b) * H + u, c, n);
    }
  } else if constexpr (cell == Cell::gru) {
    V r = of_x(0) + load(s), z = of_x(1) + load(s + lanes), g = of_x(2);
    V hn = load(s + 2 * lanes);
    if (a.b_hn) hn += load(a.b_hn + u, n);
    gru_forward<typename P::Functions>(r, z, g, hn, load(a.hn + b * H + u, n), h);
    if (a.train) {
      store(kept, r, n);
      store(kept + H, z, n);
      store(kept + 2 * H, g, n);
      store(row + 3 * H, hn, n);
    }
  } else {
    h = of_x(0) + load(s);
    if constexpr (cell == Cell::tanh)
      h = P::Functions::tanh(h);
    else
      h = h < 0 ? V{} : h;
  }
  return h;
}

// Store a vector of h, and put it into `out`, the operand of the next step.
template <class P>
void store_state(const RnnProblem& p, const RnnForward<typename P::Number>& a, const P& product, const Walk& at,
                 int64_t b, int64_t u, int n, const Vector<State<typename P::Number>>& h, typename P::Operand* out) {
  store(a.y + (at.row + b) * p.out() + u, h, n);
  store(a.hn + b * p.out() + u, h, n);
  product.put(out + b * product.ld, u, h, n);
}

// `out` is the operand of the next product: of the next step, or of the projection, then `second`.
template <class P, Cell cell, int count>
void forward_units(const RnnProblem& p, const RnnForward<typename P::Number>& a, const P& product, const P& second,
                   const Inputs<P, cell>& inputs, const Walk& at, int64_t u, const typename P::Operand* panel,
                   const typename P::Operand* next, const typename P::Operand* in, typename P::Operand* out,
                   State<typename P::Number>* scratch) {
  const bool projects = cell == Cell::lstm && p.projection;
  constexpr int G = gates_of(cell), lanes = kLanes<State<typename P::Number>>, width = G * count * lanes;
  const auto fetch = [&](int64_t i, int64_t n) {
    const int64_t columns = (G == 3 && a.train ? 4 : G) * p.hidden;
    for (int64_t b = at.rows() * i / n; b < at.rows() * (i + 1) / n; ++b) {
      for (int64_t g = 0; a.gates && g < columns; g += p.hidden) {
        auto* const gate = a.gates + (at.row_in_block + b) * a.ld + g + u;
        P::kTakesX ? prefetch_to_write(gate, count * lanes) : prefetch(gate, count * lanes);
      }
      prefetch_to_write(out + b * (projects ? second : product).ld + u, count * lanes);
      if (!projects) prefetch_to_write(a.y + (at.row + b) * p.hidden + u, count * lanes);
      if (cell == Cell::lstm && a.train) prefetch_to_write(a.c + (at.row + b) * p.hidden + u, count * lanes);
    }
  };
  product.template multiply<G * count>(in, product.ld, at.rows(), panel, next, scratch, fetch);
  for (int64_t b = 0; b < at.rows(); ++b)
    for (int j = 0; j < count; ++j) {
      const int64_t v = u + j * lanes;
      const int n = lanes_left<lanes>(p.hidden, v);
      const auto h = forward_gates<P, cell>(p, a, at, b, v, n, scratch + b * width + j * G * lanes,
                                            inputs.template of<count>(at.row + b, u, j));
      if (projects)
        second.put(out + b * second.ld, v, h, n);
      else
        store_state(p, a, product, at, b, v, n, h, out);
    }
}

// h [rows, count vectors from u on] = what is projected · W_hrᵀ
template <class P, int count>
void project(const RnnProblem& p, const RnnForward<typename P::Number>& a, const P& product, const P& second,
             const Walk& at, int64_t u, const typename P::Operand* panel, const typename P::Operand* next,
             const typename P::Operand* in, typename P::Operand* out, State<typename P::Number>* scratch) {
  constexpr int lanes = kLanes<State<typename P::Number>>;
  second.template multiply<count>(in, second.ld, at.rows(), panel, next, scratch, [](int64_t, int64_t) {});
  for (int64_t b = 0; b < at.rows(); ++b)
    for (int j = 0; j < count; ++j) {
      const int64_t v = u + j * lanes;
      store_state(p, a, product, at, b, v, lanes_left<lanes>(p.projection, v), load(scratch + (b * count + j) * lanes),
                  out);
    }
}

template <class P, Cell cell>
void forward(const RnnProblem& p, const RnnForward<typename P::Number>& a) {
  using S = State<typename P::Number>;
  constexpr int G = gates_of(cell), lanes = kLanes<S>, most = P::units(G), most_projected = P::units(1);
  const Workspace<P> space(p, false, a.workspace);
  const int64_t H = p.hidden, out = p.out();
  const bool projects = cell == Cell::lstm && p.projection;
  parallel(team_size(p, lanes), [&](Member& me) {
    typename P::Registers registers;
    const P product(p, out, &registers), second(p, H, &registers);
    Inputs<P, cell> inputs(p, a, space, &registers);
    S* const scratch = space.scratch(me.index);
    const auto panel_of = [&](int64_t u) { return space.panels() + u / lanes * G * product.panel_numbers(); };
    const auto second_panel_of = [&](int64_t u) { return space.projection() + u / lanes * second.panel_numbers(); };
    Walk at(p, false);
    for (int64_t b = me.begin(p.batch); b < me.end(p.batch); ++b) {
      for (int turn = 0; turn < 2; ++turn) product.pad(space.operand(turn) + b * product.ld);
      if (projects) second.pad(space.projected() + b * second.ld);
    }
    if (at.begins())
      for_units<lanes, most>(me, H, false, [&](int64_t u, auto count, int64_t) {
        product.template pack_gates<G, count>(a.w_hh, H, u, panel_of(u));
        inputs.template pack<count>(u);
        const int64_t n = H - u < count * lanes ? H - u : count * lanes;
        for (int64_t b = 0; b < p.batch && cell == Cell::lstm; ++b)
          std::memcpy(a.cn + b * H + u, a.c0 + b * H + u, n * sizeof(S));
      });
    for_units<lanes, most_projected>(me, out, false, [&](int64_t u, auto count, int64_t) {
      if (projects && at.begins()) second.template pack_gates<1, count>(a.w_hr, out, u, second_panel_of(u));
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t v = u; v < u + count * lanes && v < out; v += lanes) {
          const int n = lanes_left<lanes>(out, v);
          if (at.begins()) store(a.hn + b * out + v, load(a.h0 + b * out + v, n), n);
          // Both operands: a sequence read backwards joins late, whichever of the two is then its turn.
          for (int turn = 0; turn < 2; ++turn)
            product.put(space.operand(turn) + b * product.ld, v, load(a.hn + b * out + v, n), n);
        }
    });
    me.meet();
    int turn = 0;
    for (bool back = true; !at.done(); at.next(), back = !back, turn ^= 1) {
      auto* const state = space.operand(turn ^ 1);
      inputs.make(me, at);
      for_units<lanes, most>(me, H, back, [&](int64_t u, auto count, int64_t next) {
        forward_units<P, cell, count>(p, a, product, second, inputs, at, u, panel_of(u), panel_of(next),
                                      space.operand(turn), projects ? space.projected() : state, scratch);
      });
      me.meet();
      if (!projects) continue;
      for_units<lanes, most_projected>(me, out, back, [&](int64_t u, auto count, int64_t next) {
        project<P, count>(p, a, product, second, at, u, second_panel_of(u), second_panel_of(next), space.projected(),
                          state, scratch);
      });
      me.meet();
    }
  });
}

// --- backward -----------------------------------------------------------------------------------------------------

// Turn the gradient of one sequence's state before projection, one vector of units, into those of its gates, and dh
// into what passes them by; add those of the gates to sums.
template <class P, Cell cell>
void backward_gates(const RnnProblem& p, const RnnBackward<typename P::Number>& a, const P& product, const Walk& at,
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
  const auto hand_back = [&](int k, const V& dx) {
    if constexpr (!P::kInPlace) product.put(operand + b * product.ld, k * H + u, dx, n);
  };
  if constexpr (cell == Cell::lstm) {
    V i = load(kept, n), f = load(kept + H, n), g = load(kept + 2 * H, n), o = load(kept + 3 * H, n);
    S* const carried_c = a.dc0 + b * H + u;
    V dc = load(carried_c, n);
    lstm_backward<typename P::Functions>(i, f, g, o, load(a.c + row * H + u, n), at.before(a.c, a.c0, b, u, n), dh, dc);
    store(carried_c, dc, n);
    dh = V{};
    const V all[] = {i, f, g, o};
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
Vector<State<typename P::Number>> gradient_of_state(const RnnProblem& p, const RnnBackward<typename P::Number>& a,
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
  for (int k = 0; k < G; ++k) prefetch_to_write(operand + b * product.ld + k * H + u, n);
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
void backward_state(const RnnProblem& p, const RnnBackward<typename P::Number>& a, const P& product, const Walk& at,
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
  product.template multiply<count>(d, P::kInPlace ? a.ld : product.ld, rows, panel, next, scratch, fetch);
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
  second.template multiply<count>(dh, P::kInPlace ? a.ld : second.ld, at.rows(), panel, next, scratch,
                                  [](int64_t, int64_t) {});
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
  parallel(team_size(p, lanes), [&](Member& me) {
    typename P::Registers registers;
    const P product(p, G * H, &registers), second(p, out, &registers);
    S* const scratch = space.scratch(me.index);
    const auto panel_of = [&](int64_t u) { return space.panels() + u / lanes * product.panel_numbers(); };
    const auto second_panel_of = [&](int64_t u) { return space.projection() + u / lanes * second.panel_numbers(); };
    Walk at(p, true);
    if constexpr (!P::kInPlace)
      for (int64_t b = me.begin(p.batch); b < me.end(p.batch); ++b) {
        for (int turn = 0; turn < 2; ++turn) product.pad(space.operand(turn) + b * product.ld);
        if (projects) second.pad(space.projected() + b * second.ld);
      }
    if (at.begins()) {
      for_units<lanes, most>(me, out, false, [&](int64_t u, auto count, int64_t) {
        const int64_t n = out - u < count * lanes ? out - u : count * lanes;
        product.template pack_units<count>(a.w_hh, out, u, n, panel_of(u));
        for (int64_t b = 0; b < p.batch; ++b) std::memcpy(a.dh0 + b * out + u, a.dhn + b * out + u, n * sizeof(S));
      });
      if (cell == Cell::lstm)
        for_units<lanes, most>(me, H, false, [&](int64_t u, auto count, int64_t) {
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
      for_units<lanes, most>(me, out, back, [&](int64_t u, auto count, int64_t next) {
        add_product(u, count, next);
        for (int64_t v = u; v < u + count * lanes && v < out; v += lanes) {
          const int n = lanes_left<lanes>(out, v);
          Vector<S> sums[kept_of(cell)] = {};
          for (int64_t b = 0; b < at.rows(); ++b) {
            if (!projects) {
              backward_state<P, cell>(p, a, product, at, b, v, n, space.operand(turn), sums);
              continue;
            }
            const auto dh = gradient_of_state<P>(p, a, at, b, v, n);
            store(dh_rows + b * a.ld + v, dh, n);
            if constexpr (!P::kInPlace) second.put(space.projected() + b * second.ld, v, dh, n);
            store(a.dh0 + b * out + v, Vector<S>{}, n);
          }
          if (!projects) add_sums<cell>(p, a, at, v, n, sums);
        }
      });
      me.meet();
      if (projects) {
        const typename P::Operand* dh;
        if constexpr (P::kInPlace)
          dh = dh_rows;
        else
          dh = space.projected();
        for_units<lanes, most>(me, H, back, [&](int64_t u, auto count, int64_t next) {
          backward_projection<P, count>(p, a, product, second, at, u, second_panel_of(u), second_panel_of(next), dh,
                                        space.operand(turn), scratch);
        });
        me.meet();
      }
      if constexpr (P::kInPlace)
        d = hidden_part<typename P::Number, cell>(p, a, at);
      else
        d = space.operand(turn);
      visited = at.rows();
    }
    for_units<lanes, most>(me, out, back, add_product);
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

#if defined(FASTLM_TILES)
template <class T>
using Product = PairProduct<T, Tiles>;
using Other = Bf16;
#elif defined(FASTLM_DOTS)
template <class T>
using Product = PairProduct<T, Dots>;
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
