// The recurrent layer of ../rnn.h on an NVIDIA GPU: the same problem, pointers and layouts, queued on a stream.
//
// T is float or double. Every pointer is device memory but RnnProblem::batch_sizes, which is read before the call
// returns. Nothing is allocated, nothing waits, and the launches can be captured into a CUDA graph.
// Throws std::runtime_error where a launch fails.
#pragma once

#include <cstddef>

#include "../rnn.h"

namespace fastlm::cuda {

size_t rnn_workspace(const RnnProblem&, bool backward, size_t size_of_number);

template <class T>
void rnn_forward(const RnnProblem&, const RnnForward<T>&, void* stream);

template <class T>
void rnn_backward(const RnnProblem&, const RnnBackward<T>&, void* stream);

// The CUDA version that this was built with, and the newest that the installed driver knows (0: no driver), as
// 1000·major + 10·minor.
int built_version();
int driver_version();

}  // namespace fastlm::cuda
