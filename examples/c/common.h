/* common.h - what the C examples share: checks that end the program, opening a bundle, token ids from lines of text. */
#ifndef COMMON_H
#define COMMON_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "device.h"

static inline void check(lococo_status status) {
  if (status == LOCOCO_OK) return;
  fprintf(stderr, "error %d: %s\n", (int)status, lococo_last_error());
  exit(1);
}

static inline void check_abi(void) {
  if (lococo_abi_version() == LOCOCO_ABI_VERSION) return;
  fprintf(stderr, "liblococo has ABI %" PRId32 ", this program was built for %d\n", lococo_abi_version(),
          LOCOCO_ABI_VERSION);
  exit(2);
}

static inline lococo_model* open_model(const char* bundle) {
  const lococo_options options = chosen_device();
  lococo_model* model = NULL;
  check(lococo_model_open(bundle, &options, &model));
  return model;
}

typedef struct id_list {
  int32_t* ids; /* free() it */
  size_t n;
} id_list;

/* Token ids from standard input: of the next line that has any, or of all lines to the end. n is 0 if there are none.
 */
static inline id_list read_ids(int whole) {
  id_list list = {NULL, 0};
  size_t room = 0;
  for (int c = getchar(); c != EOF; c = getchar()) {
    if (c == '\n' && list.n > 0 && !whole) break;
    if (c == ' ' || c == '\t' || c == '\r' || c == '\n') continue;
    ungetc(c, stdin);
    if (list.n == room) {
      room = room == 0 ? 256 : 2 * room;
      list.ids = realloc(list.ids, room * sizeof *list.ids);
      if (list.ids == NULL) exit(1);
    }
    if (scanf("%" SCNd32, &list.ids[list.n]) != 1) {
      fprintf(stderr, "expected token ids separated by spaces\n");
      exit(2);
    }
    ++list.n;
  }
  return list;
}

#endif
