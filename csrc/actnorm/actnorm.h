// Actnorm on the CPU: the structs that describe a problem. The formulas are those of
// mflow_kernels/ops/actnorm.py.
#pragma once

#include "../common/state_view.h"

namespace mflow {

struct ActNorm {
    bool is_double = false, inverse = false;
    Shape shape;
    const void *bias = nullptr, *log_scale = nullptr;  // (C), dense
    StateView x, y;
    SampleValues logdet;
};

struct ActNormBackward {
    bool is_double = false, inverse = false;
    Shape shape;
    const void *bias = nullptr, *log_scale = nullptr;
    StateView x, dy, dx;
    SampleValues dlogdet;
    void *dbias = nullptr, *dlog_scale = nullptr;  // (C), dense
};

void run(const ActNorm& problem, int threads);
void run(const ActNormBackward& problem, int threads);

}  // namespace mflow
