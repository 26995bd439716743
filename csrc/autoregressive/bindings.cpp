// Binds masked autoregressive maps to Python. The checks here keep the loops from reading or
// writing wrong memory. The caller (mflow_kernels/ops/masked_autoregressive.py) has checked devices.

#include <string>

#include "../coupling/describe.h"
#include "../spline/describe.h"
#include "activations.h"
#include "autoregressive.h"

namespace mflow {
namespace {

// Reads the plan that `SortedNetwork` of mflow_kernels/ops/sorted_network.py makes: whole numbers, and lists of
// whole numbers that it refers to by their first index.
class Plan {
public:
    Plan(const int64_t* data, int64_t size) : data_(data), size_(size) {}

    int64_t next() { return at(position_++); }

    // A list of `count` numbers, each from `least` to below `end`.
    const int64_t* list(int64_t count, int64_t least, int64_t end) {
        const int64_t first = next();
        if (count < 0 || first < 0 || first > size_ - count) fail("expected lists inside the plan");
        for (int64_t i = 0; i < count; ++i) {
            if (data_[first + i] < least || data_[first + i] >= end) fail("expected rows that exist");
        }
        return data_ + first;
    }

    // The first rows of the degrees: rising, from 0 to `units`.
    const int64_t* starts(int64_t degrees, int64_t units) {
        const int64_t* const found = list(degrees + 1, 0, units + 1);
        bool rising = found[0] == 0 && found[degrees] == units;
        for (int64_t d = 0; d < degrees; ++d) rising = rising && found[d] <= found[d + 1];
        if (!rising) fail("expected rising degrees");
        return found;
    }

private:
    int64_t at(int64_t i) const {
        if (i < 0 || i >= size_) fail("expected a longer plan");
        return data_[i];
    }
    const int64_t* data_;
    int64_t size_, position_ = 0;
};

// Where `count` numbers begin.
int64_t offset(Plan& plan, int64_t count, int64_t numbers) {
    const int64_t first = plan.next();
    if (first < 0 || count < 0 || first > numbers - count) fail("expected offsets inside the numbers");
    return first;
}

void read_operation(MaskedMap& p, Plan& plan, std::vector<int64_t>& units, const std::vector<int64_t>& context_units,
                    int64_t numbers) {
    using Kind = MaskedOperation::Kind;
    MaskedOperation o;
    const int64_t values = static_cast<int64_t>(units.size()), kind = plan.next();
    if (kind < 0 || kind > static_cast<int64_t>(Kind::pick)) fail("unknown operation");
    o.kind = static_cast<Kind>(kind);
    o.units = plan.next();
    if (o.units < 0 || o.units > (int64_t(1) << 40)) fail("expected a number of units");
    o.source = plan.next();
    if (o.source < 0 || o.source >= values) fail("expected the number of an earlier value");
    o.starts = plan.starts(p.degrees, o.units);
    const int64_t inputs = units[o.source];
    if (o.kind == Kind::linear) {
        o.inputs = inputs;
        o.known = plan.list(p.degrees, 0, inputs + 1);
        o.weight = offset(plan, o.units * inputs, numbers);
        o.bias = offset(plan, o.units, numbers);
    } else {
        o.rows = plan.list(o.units, 0, inputs);
    }
    if (o.kind == Kind::activation) {
        o.activation = static_cast<int>(plan.next());
        if (!Activations::has(o.activation)) fail("unknown activation");
        o.constant = offset(plan, 1, numbers);
    } else if (o.kind == Kind::affine) {
        o.weight = offset(plan, o.units, numbers);
        o.bias = offset(plan, o.units, numbers);
    } else if (o.kind == Kind::add || o.kind == Kind::add_context || o.kind == Kind::gate) {
        o.other = plan.next();
        const std::vector<int64_t>& rows = o.kind == Kind::add ? units : context_units;
        if (o.other < 0 || o.other >= static_cast<int64_t>(rows.size())) fail("expected an earlier value");
        o.other_rows = plan.list(o.units, 0, rows[o.other]);
    }
    units.push_back(o.units);
    p.operations.push_back(o);
}

// Sets all but results and gradients. `transform` is `Spline.args` or `ScaleFunction.args`.
void describe(MaskedMap& p, Arguments& arguments, const py::object& given, const py::object& plan_of,
              const py::object& numbers_of, const py::tuple& contexts, const py::tuple& transform, bool is_spline,
              bool inverse, std::vector<Tensor>& kept) {
    Shape shape;
    p.is_double = arguments.is_double;
    p.inverse = inverse;
    p.given = arguments.state(given, Use::read, shape);
    p.samples = shape.samples;
    p.features = shape.channels;
    if (shape.pixels != 1) fail("expected vectors");
    p.is_spline = is_spline;
    p.coupling.is_double = p.is_double;
    p.coupling.inverse = inverse;
    is_spline ? set_options(p.spline, transform) : set_options(p.coupling, transform);
    std::vector<int64_t> context_units;
    for (const py::handle& one : contexts) {
        Shape own;
        p.contexts.push_back(arguments.state(py::reinterpret_borrow<py::object>(one), Use::read, own));
        if (own.samples != p.samples || own.pixels != 1) fail("expected contexts (N, units)");
        context_units.push_back(own.channels);
    }
    if (py::cast<int>(plan_of.attr("dtype").attr("itemsize")) != 8) fail("expected a plan of int64");
    const Tensor& ints = kept.emplace_back(plan_of, py::object(plan_of.attr("dtype")), Use::read);
    if (ints.axes() != 1 || ints.stride(0) != 1) fail("expected a dense plan");
    Plan plan(static_cast<const int64_t*>(ints.data()), ints.length(0));
    // Use::write requires the state's dtype.
    const Tensor& reals = kept.emplace_back(numbers_of, py::object(given.attr("dtype")), Use::write);
    if (reals.axes() != 1 || reals.stride(0) != 1) fail("expected dense numbers");
    p.numbers = reals.data();
    p.count = reals.length(0);
    if (plan.next() != p.features) fail("expected a plan for other features");
    p.degrees = plan.next();
    if (p.degrees < 1 || p.degrees > p.features) fail("expected 1 to D degrees");
    const int64_t count = plan.next();
    if (count < 1 || count > 100000) fail("expected a number of operations");
    p.order = plan.list(p.features, 0, p.features);
    p.starts = plan.starts(p.degrees, p.features);
    std::vector<int64_t> units = {p.features};
    for (int64_t i = 0; i < count; ++i) read_operation(p, plan, units, context_units, p.count);
    if (units.back() != p.features * p.params()) fail("expected the params of all features");
}

void masked_map(int threads, const py::object& given, const py::object& result, const py::object& logdet,
                const py::object& plan, const py::object& numbers, const py::tuple& contexts,
                const py::tuple& transform, bool is_spline, bool inverse) {
    Arguments arguments(given);
    std::vector<Tensor> kept;
    kept.reserve(2);
    MaskedMap p;
    describe(p, arguments, given, plan, numbers, contexts, transform, is_spline, inverse, kept);
    p.result = arguments.state_like(result, Use::write, {p.samples, p.features, 1});
    p.logdet = arguments.samples(logdet, Use::write, p.samples);
    py::gil_scoped_release release;
    run(p, threads);
}

void masked_map_backward(int threads, const py::object& given, const py::object& x, const py::object& dresult,
                         const py::object& dlogdet, const py::object& dgiven, const py::object& dnumbers,
                         const py::tuple& dcontexts, const py::object& plan, const py::object& numbers,
                         const py::tuple& contexts, const py::tuple& transform, bool is_spline, bool inverse) {
    Arguments arguments(given);
    std::vector<Tensor> kept;
    kept.reserve(3);
    MaskedMap p;
    describe(p, arguments, given, plan, numbers, contexts, transform, is_spline, inverse, kept);
    const Shape shape = {p.samples, p.features, 1};
    p.result = arguments.state_like(x, Use::read, shape);
    p.dresult = arguments.state_like(dresult, Use::read, shape);
    p.dlogdet = arguments.samples(dlogdet, Use::read, p.samples);
    p.dgiven = arguments.state_like(dgiven, Use::write, shape);
    if (dcontexts.size() != contexts.size()) fail("expected a gradient of each context");
    for (size_t i = 0; i < contexts.size(); ++i) {
        Shape own, wanted;
        arguments.state(contexts[i], Use::read, wanted);
        p.dcontexts.push_back(arguments.state(dcontexts[i], Use::write, own));
        if (own.samples != p.samples || own.channels != wanted.channels || own.pixels != 1) {
            fail("expected gradients of the contexts' shapes");
        }
    }
    const Tensor& sums = kept.emplace_back(dnumbers, py::object(given.attr("dtype")), Use::write);
    if (sums.axes() != 2 || sums.length(1) != p.count || sums.stride(1) != 1 || sums.stride(0) != p.count) {
        fail("expected dense sums (chunks, numbers)");
    }
    p.dnumbers = sums.data();
    p.chunks = sums.length(0);
    py::gil_scoped_release release;
    run(p, threads);
}

}  // namespace

void bind_autoregressive(py::module_& m) {
    m.def("masked_map", &masked_map);
    m.def("masked_map_backward", &masked_map_backward);
}

}  // namespace mflow
