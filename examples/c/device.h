/* device.h - where the examples in C and C++ run: on the CPU, or where $LOCOCO_DEVICE and $LOCOCO_BACKEND say, such as
 * cuda:0 and tensorrt. Nothing else in them depends on it. */
#ifndef DEVICE_H
#define DEVICE_H

#include <stdlib.h>
#include <string.h>

#include "lococo.h"

static inline lococo_options chosen_device(void) {
  lococo_options options;
  memset(&options, 0, sizeof options);
  options.struct_size = sizeof options;
  options.device = getenv("LOCOCO_DEVICE"); /* NULL is the default */
  options.backend = getenv("LOCOCO_BACKEND");
  return options;
}

#endif
