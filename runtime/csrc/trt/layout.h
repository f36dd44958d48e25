// layout.h - in liblococo: where every tensor of a session lies in its one allocation on the device.
#pragma once

#include <cstdint>

#include "manifest.h"
#include "module.h"

namespace lococo::trt {

// Tokens of a window: from mem_size live slots to the fusion.
inline int32_t window_tokens(const Manifest& m) { return m.capacity - m.mem_size + 1; }

lococo_module_layout make_layout(const Manifest& manifest);

// The offset of an input or output of a graph; LOCOCO_MODULE_NO_OFFSET for the logits of a whole block.
uint64_t offset_of(const lococo_module_layout& layout, GraphKind kind, const TensorSpec& tensor);

}  // namespace lococo::trt
