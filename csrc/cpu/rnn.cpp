// The recurrent layer on the CPU. One parallel region runs over time; each thread owns a range of hidden units and
// the panels of W_hh that make them, and all meet once a step.

#include <type_traits>

#include "../rnn.h"

#include "gemm.h"
#include "team.h"

namespace fastlm {

FASTLM_DECLARE_RNN(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// Columns of dgates, and of gates where they are kept, in units of H.
constexpr int kept_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 1; }

// Vectors side by side in a panel of weights: as many units as fit with all their gates, so 1 for LSTM and GRU.
constexpr int kPanel = 4;

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
  // True where sequence b is read no further after this step.
  bool ends(int64_t b) const { return p.reverse ? t == 0 : t + 1 == p.steps || b >= rows_at(t + 1); }
  // Row b of a state one step earlier in reading; `initial` before the first.
  template <class T>
  const T* before(const T* states, const T* initial, int64_t b) const {
    if (!p.reverse && t > 0) return states + (row - rows_at(t - 1) + b) * p.hidden;
    if (p.reverse && t + 1 < p.steps && b < rows_at(t + 1)) return states + (row + rows() + b) * p.hidden;
    return initial + b * p.hidden;
  }
};

// Where things lie in the workspace, in numbers, each part on its own cache lines.
struct Layout {
  int64_t ld;  // of the operand that all threads read in the forward pass
  int64_t panels, operand, scratch, partial, total;

  Layout(const RnnProblem& p, bool backward, int size) {
    const int gates = gates_of(p.cell), lanes = kVectorBytes / size;
    const int64_t vectors = (p.hidden + lanes - 1) / lanes;
    const auto lines = [](int64_t n) { return (n + 31) / 32 * 32; };
    ld = lines(p.hidden) + 16;
    if (ld * size % 4096 == 0) ld += 16;  // rows a page apart share cache sets
    panels = p.batch > 1 ? lines(vectors * lanes * gates * p.hidden) : 0;
    operand = backward ? 0 : lines(p.batch * ld);
    scratch = lines(p.batch * kPanel * lanes);
    partial = p.batch == 1 && backward ? lines(p.hidden) : 0;
    total = panels + 2 * operand + p.threads * (scratch + 2 * partial);
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
template <class T, Cell cell>
void forward_gates(const RnnProblem& p, const RnnForward<T>& a, const Walk& at, int64_t b, int64_t u, int n,
                   const T* s, T* operand) {
  constexpr int lanes = kLanes<T>;
  using V = Vector<T>;
  const int64_t H = p.hidden, row = at.row + b, block_row = at.row_in_block + b;
  V h;
  if constexpr (cell == Cell::lstm) {
    T* x = a.gates + block_row * 4 * H + u;
    V i = load(x, n) + load(s), f = load(x + H, n) + load(s + lanes);
    V g = load(x + 2 * H, n) + load(s + 2 * lanes), o = load(x + 3 * H, n) + load(s + 3 * lanes), c;
    T* running = a.cn + b * H + u;
    lstm_forward<Math<T>>(i, f, g, o, load(running, n), c, h);
    store(running, c, n);
    if (a.train) {
      store(x, i, n);
      store(x + H, f, n);
      store(x + 2 * H, g, n);
      store(x + 3 * H, o, n);
      store(a.c + row * H + u, c, n);
    }
  } else if constexpr (cell == Cell::gru) {
    T* x = a.gates + block_row * (a.train ? 4 : 3) * H + u;
    V r = load(x, n) + load(s), z = load(x + H, n) + load(s + lanes), g = load(x + 2 * H, n);
    V hn = load(s + 2 * lanes);
    if (a.b_hn) hn += load(a.b_hn + u, n);
    gru_forward<Math<T>>(r, z, g, hn, load(at.before(a.y, a.h0, b) + u, n), h);
    if (a.train) {
      store(x, r, n);
      store(x + H, z, n);
      store(x + 2 * H, g, n);
      store(x + 3 * H, hn, n);
    }
  } else {
    h = load(a.gates + block_row * H + u, n) + load(s);
    if constexpr (cell == Cell::tanh)
      h = Math<T>::tanh(h);
    else
      h = h < 0 ? V{} : h;
  }
  store(a.y + row * H + u, h, n);
  store(operand + u, h, n);
  if (at.ends(b)) store(a.hn + b * H + u, h, n);
}

// The panel of `count` vectors of units from u on; its W_hh rows of all gates side by side.
template <class T, Cell cell, int count>
void forward_pack(const RnnProblem& p, const T* w, int64_t u, T* panel) {
  constexpr int G = gates_of(cell);
  if constexpr (G == 1)
    pack_rows<T, count>(w, kLanes<T>, kLanes<T>, p.hidden, p.hidden, u, panel);
  else
    pack_rows<T, G>(w, p.hidden, 0, p.hidden, p.hidden, u, panel);
}

template <class T, Cell cell, int count>
void forward_units(const RnnProblem& p, const RnnForward<T>& a, const Walk& at, int64_t u, const T* panel,
                   const T* next, const T* in, T* out, int64_t ld, T* scratch) {
  constexpr int G = gates_of(cell), lanes = kLanes<T>, width = G * count * lanes;
  if (p.batch == 1) {
    for (int g = 0; g < G; ++g) {
      const int64_t left = p.hidden - u, n = left < count * lanes ? left : count * lanes;
      dot_rows(a.w_hh + (g * p.hidden + u) * p.hidden, p.hidden, int(n), in, scratch + g * lanes);
    }
  } else {
    multiply<T, G * count>(in, ld, at.rows(), panel, next, p.hidden, scratch, [&](int64_t i, int64_t n) {
      const int64_t columns = (G == 3 && a.train ? 4 : G) * p.hidden;
      for (int64_t b = at.rows() * i / n; b < at.rows() * (i + 1) / n; ++b) {
        for (int g = 0; g < G; ++g) prefetch(a.gates + (at.row_in_block + b) * columns + g * p.hidden + u, count);
        prefetch_to_write(out + b * ld + u, count);
        prefetch_to_write(a.y + (at.row + b) * p.hidden + u, count);
        if (cell == Cell::lstm && a.train) prefetch_to_write(a.c + (at.row + b) * p.hidden + u, count);
      }
    });
  }
  for (int64_t b = 0; b < at.rows(); ++b)
    for (int j = 0; j < count; ++j) {
      const int64_t v = u + j * lanes;
      forward_gates<T, cell>(p, a, at, b, v, lanes_left<lanes>(p.hidden, v), scratch + b * width + j * lanes,
                             out + b * ld);
    }
}

template <class T, Cell cell>
void forward(const RnnProblem& p, const RnnForward<T>& a) {
  constexpr int G = gates_of(cell), lanes = kLanes<T>, most = kPanel / G;
  const Layout layout(p, false, sizeof(T));
  T* const panels = static_cast<T*>(a.workspace);
  T* const operands = panels + layout.panels;
  const int64_t H = p.hidden;
  parallel(team_size(p, lanes), [&](Member& me) {
    T* const scratch = operands + 2 * layout.operand + me.index * layout.scratch;
    Walk at(p, false);
    for_units<lanes, most>(me, H, false, [&](int64_t u, auto count, int64_t) {
      const int64_t n = H - u < count * lanes ? H - u : count * lanes;
      if (p.batch > 1 && at.begins()) forward_pack<T, cell, count>(p, a.w_hh, u, panels + u * G * H);
      for (int64_t b = 0; b < p.batch; ++b) {
        const T* h = b < at.rows() ? at.before(a.y, a.h0, b) : a.h0 + b * H;
        // Both operands: a sequence read backwards joins late, whichever of the two is then its turn.
        for (int i = 0; i < 2; ++i) std::memcpy(operands + i * layout.operand + b * layout.ld + u, h + u, n * sizeof(T));
        if (cell == Cell::lstm && at.begins()) std::memcpy(a.cn + b * H + u, a.c0 + b * H + u, n * sizeof(T));
      }
    });
    me.meet();
    const T* in = operands;
    T* out = operands + layout.operand;
    for (bool back = true; !at.done(); at.next(), back = !back) {
      for_units<lanes, most>(me, H, back, [&](int64_t u, auto count, int64_t next) {
        forward_units<T, cell, count>(p, a, at, u, panels + u * G * H, panels + next * G * H, in, out, layout.ld,
                                      scratch);
      });
      me.meet();
      T* const free = const_cast<T*>(in);
      in = out;
      out = free;
    }
  });
}

// --- backward -----------------------------------------------------------------------------------------------------

// Turn the gradient of one sequence's state, one vector of units, into those of its gates and what passes them by.
template <class T, Cell cell>
void backward_gates(const RnnProblem& p, const RnnBackward<T>& a, const Walk& at, int64_t b, int64_t u, int n) {
  using V = Vector<T>;
  const int64_t H = p.hidden, row = at.row + b, block_row = at.row_in_block + b;
  T* const carried = a.dh0 + b * H + u;
  T* const d = a.dgates + block_row * a.ld + u;
  V dh = load(carried, n) + load(a.dy + row * H + u, n);
  const T* x = a.gates + block_row * 4 * H + u;
  if constexpr (cell == Cell::lstm) {
    V i = load(x, n), f = load(x + H, n), g = load(x + 2 * H, n), o = load(x + 3 * H, n);
    T* const carried_c = a.dc0 + b * H + u;
    V dc = load(carried_c, n);
    lstm_backward<Math<T>>(i, f, g, o, load(a.c + row * H + u, n), load(at.before(a.c, a.c0, b) + u, n), dh, dc);
    store(carried_c, dc, n);
    store(carried, V{}, n);
    const V all[] = {i, f, g, o};
    for (int k = 0; k < 4; ++k) store(d + k * H, all[k], n);
  } else if constexpr (cell == Cell::gru) {
    V r = load(x, n), z = load(x + H, n), g = load(x + 2 * H, n), hn = load(x + 3 * H, n);
    gru_backward<Math<T>>(r, z, g, hn, load(at.before(a.y, a.h0, b) + u, n), dh);
    store(carried, dh, n);
    const V all[] = {g, r, z, hn};
    for (int k = 0; k < 4; ++k) store(d + k * H, all[k], n);
  } else {
    const V h = load(a.y + row * H + u, n);
    const V dx = cell == Cell::tanh ? dh * (1 - h * h) : h <= 0 ? V{} : dh;
    store(carried, V{}, n);
    store(d, dx, n);
  }
}

// dh0 [rows, count vectors from u on] += what the gates of the step visited before, d, hand back
template <class T, int count>
void backward_product(const RnnProblem& p, const RnnBackward<T>& a, int64_t u, const T* panel, const T* next,
                      const T* d, int64_t depth, int64_t rows, T* scratch) {
  constexpr int lanes = kLanes<T>;
  if (rows == 0) return;
  multiply<T, count>(d, a.ld, rows, panel, next, depth, scratch, [](int64_t, int64_t) {});
  for (int64_t b = 0; b < rows; ++b)
    for (int j = 0; j < count; ++j) {
      const int n = lanes_left<lanes>(p.hidden, u + j * lanes);
      T* const to = a.dh0 + b * p.hidden + u + j * lanes;
      store(to, load(to, n) + load(scratch + (b * count + j) * lanes), n);
    }
}

// The columns of dgates that belong to U h: all, but for GRU's first.
template <class T, Cell cell>
const T* hidden_part(const RnnProblem& p, const RnnBackward<T>& a, const Walk& at) {
  return a.dgates + at.row_in_block * a.ld + (cell == Cell::gru ? p.hidden : 0);
}

template <class T, Cell cell>
void backward(const RnnProblem& p, const RnnBackward<T>& a) {
  constexpr int G = gates_of(cell), lanes = kLanes<T>, most = kPanel;
  const Layout layout(p, true, sizeof(T));
  T* const panels = static_cast<T*>(a.workspace);
  const int64_t H = p.hidden, depth = G * H;
  parallel(team_size(p, lanes), [&](Member& me) {
    T* const scratch = panels + layout.panels + me.index * layout.scratch;
    Walk at(p, true);
    if (at.begins())
      for_units<lanes, most>(me, H, false, [&](int64_t u, auto count, int64_t) {
        const int64_t n = H - u < count * lanes ? H - u : count * lanes;
        pack_columns<T, count>(a.w_hh, H, depth, u, n, panels + u * depth);
        for (int64_t b = 0; b < p.batch; ++b) {
          std::memcpy(a.dh0 + b * H + u, a.dhn + b * H + u, n * sizeof(T));
          if (cell == Cell::lstm) std::memcpy(a.dc0 + b * H + u, a.dcn + b * H + u, n * sizeof(T));
        }
      });
    const T* d = nullptr;  // of the step visited before, and its rows
    int64_t visited = 0;
    bool back = true;
    const auto product = [&](int64_t u, auto count, int64_t next) {
      backward_product<T, count>(p, a, u, panels + u * depth, panels + next * depth, d, depth, visited, scratch);
    };
    for (; !at.done(); at.next(), back = !back) {
      for_units<lanes, most>(me, H, back, [&](int64_t u, auto count, int64_t next) {
        product(u, count, next);
        for (int64_t b = 0; b < at.rows(); ++b)
          for (int64_t v = u; v < u + count * lanes && v < H; v += lanes)
            backward_gates<T, cell>(p, a, at, b, v, lanes_left<lanes>(H, v));
      });
      me.meet();
      d = hidden_part<T, cell>(p, a, at);
      visited = at.rows();
    }
    for_units<lanes, most>(me, H, back, product);
  });
}

// One sequence: W_hh is read in place, row by row. Each thread multiplies the rows of its own units' gates and all
// add up the partial sums for their units after the meeting.
template <class T, Cell cell>
void backward_alone(const RnnProblem& p, const RnnBackward<T>& a) {
  constexpr int G = gates_of(cell), lanes = kLanes<T>;
  const Layout layout(p, true, sizeof(T));
  T* const partials = static_cast<T*>(a.workspace) + layout.panels;
  const int64_t H = p.hidden, vectors = (H + lanes - 1) / lanes;
  if (Walk(p, true).begins()) {
    std::memcpy(a.dh0, a.dhn, H * sizeof(T));
    if (cell == Cell::lstm) std::memcpy(a.dc0, a.dcn, H * sizeof(T));
  }
  parallel(team_size(p, lanes), [&](Member& me) {
    const int64_t u0 = me.begin(vectors) * lanes, last = me.end(vectors) * lanes, u1 = last < H ? last : H;
    T* const sums[2] = {partials, partials + me.count * layout.partial};
    int turn = 0;
    const auto collect = [&](const T* parts) {
      for (int64_t u = u0; u < u1; u += lanes) {
        const int n = lanes_left<lanes>(H, u);
        Vector<T> total = load(a.dh0 + u, n);
        for (int i = 0; i < me.count; ++i) total += load(parts + i * layout.partial + u, n);
        store(a.dh0 + u, total, n);
      }
    };
    for (Walk at(p, true); !at.done(); at.next(), turn ^= 1) {
      for (int64_t u = u0; u < u1; u += lanes)
        backward_gates<T, cell>(p, a, at, 0, u, lanes_left<lanes>(H, u));
      T* const mine = sums[turn] + me.index * layout.partial;
      std::memset(mine, 0, H * sizeof(T));
      const T* const d = hidden_part<T, cell>(p, a, at);
      for (int i = 0; i < G; ++i) {
        const int g = turn ? G - 1 - i : i;
        add_rows(a.w_hh + (g * H + u0) * H, H, int(u1 - u0), turn, d + g * H + u0, mine);
      }
      me.meet();
      collect(sums[turn]);
    }
  });
}

template <class T>
void forward_any(const RnnProblem& p, const RnnForward<T>& a) {
  if (p.batch == 0) return;
  switch (p.cell) {
    case Cell::lstm: return forward<T, Cell::lstm>(p, a);
    case Cell::gru: return forward<T, Cell::gru>(p, a);
    case Cell::tanh: return forward<T, Cell::tanh>(p, a);
    case Cell::relu: return forward<T, Cell::relu>(p, a);
  }
}

template <class T, Cell cell>
void backward_cell(const RnnProblem& p, const RnnBackward<T>& a) {
  if (p.batch == 1)
    backward_alone<T, cell>(p, a);
  else
    backward<T, cell>(p, a);
}

template <class T>
void backward_any(const RnnProblem& p, const RnnBackward<T>& a) {
  if (p.batch == 0) return;
  switch (p.cell) {
    case Cell::lstm: return backward_cell<T, Cell::lstm>(p, a);
    case Cell::gru: return backward_cell<T, Cell::gru>(p, a);
    case Cell::tanh: return backward_cell<T, Cell::tanh>(p, a);
    case Cell::relu: return backward_cell<T, Cell::relu>(p, a);
  }
}

}  // namespace

size_t rnn_workspace(const RnnProblem& p, bool backward, size_t number) {
  return Layout(p, backward, int(number)).total * number;
}

void rnn_forward(const RnnProblem& p, const RnnForward<float>& a) { forward_any(p, a); }
void rnn_forward(const RnnProblem& p, const RnnForward<double>& a) { forward_any(p, a); }
void rnn_backward(const RnnProblem& p, const RnnBackward<float>& a) { backward_any(p, a); }
void rnn_backward(const RnnProblem& p, const RnnBackward<double>& a) { backward_any(p, a); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
