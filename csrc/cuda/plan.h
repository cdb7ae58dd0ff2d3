// How a recurrent pass is spread over a GPU. Plain functions, so that tests can check them without one.
//
// The batch is cut into groups of 8·n_tiles sequences. A team of `slices` blocks takes a group through all its steps:
// each block owns `units` hidden units with all their gates, keeps their recurrent weights in shared memory, and makes,
// step after step, the product of those weights with what the whole team has published of the step before:
//   forward:  rows = a unit's gates (units · G),  depth = hidden units,             published: h
//   backward: rows = units,                       depth = gates of all hidden units, published: gradients of the gates
// The depth is cut into spans of 32 units, gate by gate inside a span, and padded with zeros; the warps of a block
// split it and add their parts up.
//
// A team exchanges in one of three ways, which plan() chooses for each pass by itself:
// - on a grid, through L2: all blocks of the launch are on the chip together, `teams` teams of each direction, and each
//   takes group after group;
// - LSTM and GRU of few units in 16 bits in clusters (cluster.h), whose blocks write into each other's shared memory: a
//   warp owns 4 units, a block has 8 warps or, for few units and sequences, 4. Weights stay in registers, `m_tiles`
//   products of 16 x 16 a warp; backward its depth is its own gates, and what blocks send each other are sums. A group
//   has its own team, a cluster each, and clusters that find no place yet wait for their turn;
// - large ones of few sequences backward on a plane of clusters (plane.h): sums go through shared memory and what is
//   published through L2; a block's depth is one part in `ranks` of all.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../gates.h"
#include "../rnn.h"

namespace fastlm::cuda {

enum class Number : int { f32, f64, tf32, bf16, fp16 };  // tf32: float32, whose products are rounded to TF32

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // of a block, but for some of clusters
constexpr int kSpan = 32;     // units
constexpr int kLoad = 16;     // bytes that a thread loads at a time
constexpr int kChunk = 64;    // bytes of a row's depth, the least that a warp takes
constexpr int kTiles[] = {1, 2, 4};  // of rows (16 each) and of sequences (8 each)
constexpr int kTogether = 18;  // multiprocessors, at most, that a cluster may lie on: an H200 holds no 8 clusters of 13
constexpr int kPlane = 8;      // blocks of a cluster of a plane
constexpr int kPackedSequences = 512;  // whose lengths travel as kernel arguments

enum class Exchange : int { cheapest, grid, cluster, plane };  // of what a team publishes; forward no plane is

struct Layer {
  Cell cell;
  Number number;
  int batch, hidden, directions;
  Exchange exchange;  // which is asked for
};

struct Chip {
  int multiprocessors;
  int shared;   // bytes that a block may use
  int cluster;  // blocks of a cluster at most; 0: it has none
  int planes;   // clusters of kPlane blocks, one on a multiprocessor, that one cooperative launch may have; 0: none
};

struct Plan {
  Exchange exchange;     // how a team exchanges
  bool held;             // on a grid: whether a warp's weights stay in registers
  int abreast;           // on a grid: groups that a team takes step by step in turn, else 1
  int ranks;             // blocks of a hardware cluster; 0: there are none. Of a plane, less than `slices`
  int warps;             // of a block
  int m_tiles, n_tiles;  // of a block's product
  int units, slices;     // units of a block; blocks of a team
  int groups, teams;     // of each direction
  int turns;             // in which the groups are taken, those of one turn side by side
  int depth;             // numbers, padded
  int row;               // numbers from one sequence to the next of what is published
  int blocks;            // of the launch: directions · teams · slices; 0: nothing fits
  int shared;            // bytes of a block
  int64_t workspace;     // bytes for each step of the pass: what the teams publish; a cluster needs none
  double cost;           // estimated clocks of a step, times the turns
};

constexpr int kHeld = 4;  // chunks of the depth whose weights a warp holds in registers on a grid, forward in 16 bits

// Products of a grid whose sums fit a thread's registers. Backward, where a row is a unit, pairs_of allows no more.
constexpr bool tiles_exist(bool tensor_core, bool backward, int m_tiles, int n_tiles) {
  return m_tiles * n_tiles <= (!tensor_core ? 2 : backward ? 4 : 8);
}

// (Unit, sequence) pairs that a thread owns at most. A loop of few instructions is worth more than one that fits any
// cell: an Elman network of few rows has units for two. Forward none does: blocks in which some threads did waited for
// ever on an H200 (Grid::put_all says why), and since that is mended they have not run there.
FASTLM_INLINE constexpr int pairs_of(bool backward, int m_tiles, int n_tiles) {
  return !backward || m_tiles * n_tiles <= 2 ? 1 : 2;
}

FASTLM_INLINE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
FASTLM_INLINE constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
constexpr int size_of(Number n) { return n == Number::f64 ? 8 : n == Number::bf16 || n == Number::fp16 ? 2 : 4; }
constexpr bool by_tensor_core(Number n) { return n != Number::f32 && n != Number::f64; }

// Numbers from one row of weights, or of partial sums of a sequence, to the next: no two rows share their banks.
constexpr int weights_row(Number n, int depth) { return by_tensor_core(n) ? depth : depth + kLoad / size_of(n); }
FASTLM_INLINE constexpr int part_row(int m_tiles) { return 16 * m_tiles + 4; }

// Bytes that a team publishes of a group in one step.
constexpr int64_t slot_bytes(const Layer& l, const Plan& p) {
  return int64_t(8) * p.n_tiles * p.row * size_of(l.number);
}

// Clocks of one step on a grid, fitted to an H200's bfloat16 LSTM, whose step takes 1.3 to 10 µs, within 9 % (26
// November 2026). It need only rank plans.
constexpr double grid_clocks(const Layer& l, bool backward, const Plan& p) {
  const double sequences = 8.0 * p.n_tiles, rows = 16.0 * p.m_tiles, bytes = double(p.depth) * size_of(l.number);
  const double some = std::min(sequences, double(l.batch));
  const double chunks = divide_up(int(bytes) / kChunk, kWarps);  // of a warp
  const double pairs = divide_up(int(p.units * some), kThreads);  // of a thread; with each, the way to the other blocks
  const double read = some * bytes / 70 + some * bytes * p.blocks / 4500;  // by a block, and by all from L2
  const double product = chunks * (400 + p.n_tiles * (40 + 4.5 * p.m_tiles));
  const double fma = by_tensor_core(l.number) ? 0 : rows * sequences * p.depth / 128;
  const double parts = 2 * kWarps * sequences * rows * 4 / 128;
  return 400 + 1600 * pairs + (backward ? 200 : 0) + read + product + fma + parts;
}

// The plan of given tiles on a grid; its `blocks` is 0 where it does not fit.
constexpr Plan plan_grid(const Layer& l, bool backward, const Chip& chip, int m_tiles, int n_tiles) {
  const int gates = gates_of(l.cell), sequences = 8 * n_tiles, number = size_of(l.number);
  Plan p{};
  p.exchange = Exchange::grid;
  p.warps = kWarps;
  p.m_tiles = m_tiles;
  p.n_tiles = n_tiles;
  const int owned = pairs_of(backward, m_tiles, n_tiles) * kThreads;
  const int most = std::min(16 * m_tiles / (backward ? 1 : gates), owned / sequences);
  p.units = divide_up(l.hidden, divide_up(l.hidden, most));
  p.slices = divide_up(l.hidden, p.units);
  p.groups = divide_up(l.batch, sequences);
  p.depth = p.row = divide_up(l.hidden, kSpan) * kSpan * (backward ? gates : 1);
  p.held = !backward && number == 2 && p.depth * number <= kHeld * kWarps * kChunk;
  const int width = by_tensor_core(l.number) ? 4 : std::max(4, number);
  const int64_t shared = int64_t(16) * m_tiles * weights_row(l.number, p.depth) * number +
                         int64_t(kWarps) * sequences * part_row(m_tiles) * width;
  const int together = chip.multiprocessors / (p.slices * l.directions);  // teams
  if (together == 0 || shared > chip.shared) return p;
  p.teams = std::min(p.groups, together);
  p.turns = divide_up(p.groups, p.teams);
  p.abreast = p.held && p.turns > 1 ? 2 : 1;
  p.blocks = l.directions * p.teams * p.slices;
  p.shared = int(shared);
  p.workspace = l.directions * p.groups * slot_bytes(l, p);
  p.cost = grid_clocks(l, backward, p) * p.turns * (p.abreast == 2 ? 0.9 : 1);  // 0.91 to 0.97 of it
  return p;
}

// What a block of cluster.h keeps in shared memory: two barriers and what it is sent of two steps, backward its own
// gates of two steps besides.
constexpr int kBarriers = 128;  // bytes, in front
FASTLM_INLINE constexpr int cluster_slot(bool backward, int warps, int m_tiles, int slices) {
  return backward ? slices * warps * 128 : m_tiles * 256;
}
FASTLM_INLINE constexpr int own_gates(int warps) { return warps * 256; }  // bytes of a step and 8 sequences

// Clocks of a step in clusters, by which the same H200 has them cheaper than a grid where they were faster.
constexpr double cluster_clocks(const Layer& l, bool backward, const Plan& p) {
  const int some = std::min(8, l.batch);
  const double shared = p.warps * some * (backward ? 2.5 : 3);  // what the warps of a block read and store besides
  return (backward ? 1210 + 8 * p.slices : 1060) + shared + some * l.hidden * (backward ? 4 : 2) / 7.5 + 25 * p.m_tiles;
}

// The plan of clusters of blocks of `warps` warps; its `blocks` is 0 where it does not fit.
constexpr Plan plan_cluster(const Layer& l, bool backward, const Chip& chip, int warps) {
  Plan p{};
  p.exchange = Exchange::cluster;
  p.abreast = 1;
  p.warps = warps;
  p.m_tiles = l.hidden <= 256 ? 16 : 32;
  p.n_tiles = 1;
  p.units = 4 * warps;
  p.slices = p.ranks = divide_up(l.hidden, p.units);
  p.groups = p.teams = divide_up(l.batch, 8);
  p.depth = p.row = 16 * p.m_tiles;
  const int shared =
      kBarriers + 2 * cluster_slot(backward, warps, p.m_tiles, p.slices) + (backward ? 2 * own_gates(warps) : 0);
  if (gates_of(l.cell) == 1 || size_of(l.number) != 2 || l.hidden > 64 * warps || p.slices > chip.cluster ||
      shared > chip.shared)
    return p;
  p.turns = divide_up(l.directions * p.groups, std::max(1, chip.multiprocessors / kTogether) * (kTogether / p.slices));
  p.blocks = l.directions * p.teams * p.slices;
  p.shared = std::max(shared, chip.shared / 2 + 1);  // no two on a multiprocessor
  p.cost = cluster_clocks(l, backward, p) * p.turns;
  return p;
}

// Tiles of rows of a plane: with fewer a warp holds its weights in registers.
constexpr int kPlaneTiles[] = {4, 6};

// Clocks of a step on a plane, by which the same H200 has it cheaper than a grid where it was faster.
constexpr double plane_clocks(const Layer& l, const Plan& p) {
  const double some = std::min(8.0 * p.n_tiles, double(l.batch));
  return (p.m_tiles == kPlaneTiles[0] ? 4000 : 6000) + some * p.depth * size_of(l.number) / 5;
}

// The plan of a plane of given tiles, for one direction; its `blocks` is 0 where it does not fit.
constexpr Plan plan_plane(const Layer& l, const Chip& chip, int m_tiles, int n_tiles) {
  const int gates = gates_of(l.cell), sequences = 8 * n_tiles, rows = 16 * m_tiles;
  const int clusters = divide_up(l.hidden, rows);
  Plan p{};
  p.exchange = Exchange::plane;
  p.abreast = 1;
  p.warps = kWarps;
  p.m_tiles = m_tiles;
  p.n_tiles = n_tiles;
  p.ranks = kPlane;
  p.units = divide_up(l.hidden, clusters * kPlane);
  p.slices = clusters * kPlane;
  p.groups = divide_up(l.batch, sequences);
  p.depth = p.row = divide_up(clusters * p.units, kSpan) * kSpan * gates;
  const int64_t shared = kBarriers + int64_t(rows) * p.depth * 2 + int64_t(kWarps) * sequences * part_row(m_tiles) * 4 +
                         2 * rows * sequences * 4;
  if (m_tiles == kPlaneTiles[0] && p.depth * 2 > 2 * kWarps * kChunk) return p;  // as many weights as a warp holds
  const int together = chip.planes / clusters;
  if (gates == 1 || size_of(l.number) != 2 || l.directions > 1 || together == 0 || shared > chip.shared) return p;
  p.teams = std::min(p.groups, together);
  p.turns = divide_up(p.groups, p.teams);
  p.blocks = p.teams * p.slices;
  p.shared = int(std::max(shared, int64_t(chip.shared / 2 + 1)));
  p.workspace = p.groups * slot_bytes(l, p) * kPlane;
  p.cost = plane_clocks(l, p) * p.turns;
  return p;
}

// The cheapest plan; its `blocks` is 0 where the recurrent weights do not fit the chip.
constexpr Plan plan(const Layer& l, bool backward, const Chip& chip) {
  Plan best{};
  const auto take = [&](const Plan& p) {
    const bool asked = l.exchange == Exchange::cheapest || l.exchange == p.exchange ||
                       (l.exchange == Exchange::plane && !backward && p.exchange == Exchange::grid);
    if (asked && p.blocks && (!best.blocks || p.cost < best.cost)) best = p;
  };
  for (const int m_tiles : kTiles)
    for (const int n_tiles : kTiles)
      if (tiles_exist(by_tensor_core(l.number), backward, m_tiles, n_tiles))
        take(plan_grid(l, backward, chip, m_tiles, n_tiles));
  for (const int warps : {kWarps / 2, kWarps}) take(plan_cluster(l, backward, chip, warps));
  for (const int m_tiles : kPlaneTiles)
    for (const int n_tiles : {1, 2})
      if (backward) take(plan_plane(l, chip, m_tiles, n_tiles));
  return best;
}

}  // namespace fastlm::cuda
