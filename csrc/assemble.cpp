// States put together from halves on the CPU. These loops move memory and add: they need no clones.

#include <algorithm>

#include "coupling.h"
#include "cpu.h"

namespace mflow {
namespace {

// Rows along the axis whose neighbours in memory are neighbours: pixels of a channel, or channels of
// a pixel.
template <class A>
struct Rows {
    A* data;
    int64_t row, step;  // strides
};

template <class A>
void add_rows(int64_t rows, int64_t width, A sign, Rows<A> half, Rows<A> other, Rows<A> out) {
    const auto each_row = [&](const auto& run) {
        for (int64_t r = 0; r < rows; ++r) {
            run();
            half.data += half.row;
            other.data += other.row;  // both strides are 0 where there is none
            out.data += out.row;
        }
    };
    const bool dense = half.step == 1 && out.step == 1 && width >= 4;
    if (dense && !other.data) {
        each_row([&] {
            in_blocks(width, [&](auto length, int64_t i) {
                std::memcpy(out.data + i, half.data + i, length.value * sizeof(A));
            });
        });
    } else if (dense && other.step == 1) {
        each_row([&] {
            in_blocks(width, [&](auto length, int64_t i) {
                for (int j = 0; j < length.value; ++j) {
                    out.data[i + j] = half.data[i + j] + sign * other.data[i + j];
                }
            });
        });
    } else {
        each_row([&] {
            for (int64_t i = 0; i < width; ++i) {
                const A added = other.data ? sign * other.data[i * other.step] : A(0);
                out.data[i * out.step] = half.data[i * half.step] + added;
            }
        });
    }
}

constexpr int64_t kPixels = 256;  // of a task, where neighbours in memory are channels

template <class A>
void assemble(const Assembly& p, int threads) {
    const bool pixels_inside = p.shape.pixels > 1 && p.out.pixel == 1;
    const int64_t parts =
        pixels_inside ? p.shape.channels : (p.shape.pixels + kPixels - 1) / kPixels;
    const auto task = [&](int64_t n, int h, int64_t channel, int64_t pixel, int64_t rows,
                          int64_t width) {
        const auto rows_of = [&](const Walk& w, int64_t c) -> Rows<A> {
            if (!w.data) return {nullptr, 0, 0};
            A* data = static_cast<A*>(w.data) + n * w.sample + c * w.channel + pixel * w.pixel;
            return pixels_inside ? Rows<A>{data, w.channel, w.pixel}
                                 : Rows<A>{data, w.pixel, w.channel};
        };
        add_rows<A>(rows, width, static_cast<A>(p.sign), rows_of(p.half[h], channel),
                    rows_of(p.other[h], channel), rows_of(p.out, channel + (h ? p.first : 0)));
    };
    share_out(p.shape.samples * parts, p.shape.size(), threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t n = i / parts, part = i % parts;
            if (pixels_inside) {
                const int h = part >= p.first;
                task(n, h, h ? part - p.first : part, 0, 1, p.shape.pixels);
                continue;
            }
            const int64_t pixel = part * kPixels;
            const int64_t rows = std::min(kPixels, p.shape.pixels - pixel);
            task(n, 0, 0, pixel, rows, p.first);
            task(n, 1, 0, pixel, rows, p.shape.channels - p.first);
        }
    });
}

}  // namespace

void assemble_cpu(const Assembly& p, int threads) {
    if (p.shape.size() == 0) return;
    p.is_double ? assemble<double>(p, threads) : assemble<float>(p, threads);
}

}  // namespace mflow
