// A list of functions that are chosen by name, for scale functions and for penalties.
#pragma once

#include <string>

#include "inline.h"

namespace mflow {

// Each row is an empty struct with a `name`. A choice is stored as the row's index.
template <class... Rows>
struct Table {
    // The index of the row with this name; -1 if there is none.
    static int find(const std::string& name) {
        int index = 0, found = -1;
        ((found = name == Rows::name ? index : found, ++index), ...);
        return found;
    }

    static bool has(int index) { return index >= 0 && index < static_cast<int>(sizeof...(Rows)); }

    // Calls use(row) with the row of this index. Returns false, and calls nothing, if there is none.
    template <class Use>
    static MFLOW_INLINE bool visit(int index, const Use& use) {
        int row = 0;
        return ((row++ == index && (use(Rows{}), true)) || ...);
    }
};

}  // namespace mflow
