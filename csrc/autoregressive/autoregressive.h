// Masked autoregressive maps and their inverses on the CPU: the struct that describes a problem. The idea and the
// formulas are those of mflow_kernels/ops/masked_autoregressive.py. This file does not depend on torch.
//
//   forward     z from x, or x from z, and the sum of log |dz/dx| or log |dx/dz| of each sample
//   backward    the gradients of what was given, of the contexts, and of all numbers
#pragma once

#include <vector>

#include "../common/state_view.h"
#include "../coupling/coupling.h"
#include "../spline/spline.h"

namespace mflow {

// An operation of the network, whose result is a value. The rows of a value are its units, sorted by degree.
struct MaskedOperation {
    enum class Kind { linear, activation, add, affine, add_context, gate, pick } kind = Kind::linear;
    int activation = -1;           // its index in Activations (activations.h)
    int64_t source = 0, other = 0;  // the values that it reads
    int64_t units = 0;
    // The rows from starts[d] to starts[d + 1] have degree d.
    const int64_t* starts = nullptr;
    // Linear: a dense matrix (units, inputs); known[d] leading rows of the source have degrees up to d.
    int64_t inputs = 0;
    const int64_t* known = nullptr;
    // The others: the row of the source, and of `other`, for each row. For a context, `other_rows` are its units.
    const int64_t* rows = nullptr;
    const int64_t* other_rows = nullptr;
    // In elements of `numbers`. An affine operation has a weight for each unit.
    int64_t weight = 0, bias = 0, constant = 0;
};

struct MaskedMap {
    bool is_double = false, inverse = false;
    int64_t samples = 0, features = 0, degrees = 0;
    std::vector<MaskedOperation> operations;  // value 0 is x, value i + 1 the result of operation i
    // The variables sorted by degree; those from starts[d] to starts[d + 1] have degree d.
    const int64_t* order = nullptr;
    const int64_t* starts = nullptr;
    const void* numbers = nullptr;  // all weights, biases and constants
    std::vector<StateView> contexts;
    // Forward reads `given`, x or z, and writes `result`, the other one, and the logdet.
    StateView given, result;
    SampleValues logdet;
    // Backward, with dresult: reads given and x (`result` if inverse), dresult and dlogdet; writes dgiven and
    // adds to the gradients of contexts. Each of the `chunks` rows of dnumbers gets the sums of some samples.
    StateView dresult, dgiven;
    SampleValues dlogdet;
    std::vector<StateView> dcontexts;
    void* dnumbers = nullptr;
    int64_t chunks = 0, count = 0;  // of the rows, and the numbers in each
    // The params of the variables: the last value. Each has raw and shift, or the numbers of a spline, in
    // consecutive rows.
    bool is_spline = false;
    Coupling coupling;
    Spline spline;

    int64_t params() const { return is_spline ? spline.options.numbers() : 2; }
};

void run(const MaskedMap& problem, int threads);

}  // namespace mflow
