/* chat.c - a conversation of any length in constant memory, over token ids.
 *
 *   cc -std=c11 chat.c $(pkg-config --cflags --libs lococo) -o chat
 *   LOCOCO_ONNXRUNTIME=/path/to/libonnxruntime.so ./chat bundle/ 64
 *
 * A line of token ids in is a turn, a line of token ids out is the reply. Text is the business of a tokenizer: the
 * caller tokenizes with the model's chat template, and gets the end-of-sequence token back too.
 */
#include "common.h"

typedef struct reply {
  int32_t last; /* the last token was chosen, but not read yet */
  int empty;
} reply;

static int print_token(int32_t token_id, void* user) {
  reply* r = user;
  printf(r->empty ? "%" PRId32 : " %" PRId32, token_id);
  fflush(stdout);
  r->last = token_id;
  r->empty = 0;
  return 0; /* go on */
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: %s BUNDLE MAX_TOKENS\n", argv[0]);
    return 2;
  }
  check_abi();
  const int32_t max_tokens = (int32_t)strtol(argv[2], NULL, 10);
  lococo_model* model = open_model(argv[1]);
  lococo_session* session = NULL;
  check(lococo_session_create(model, &session));

  reply r = {0, 1};
  for (id_list turn = read_ids(0); turn.n > 0; turn = read_ids(0)) {
    if (!r.empty) check(lococo_session_step(session, r.last));
    check(lococo_session_prefill(session, turn.ids, turn.n, NULL));
    free(turn.ids);
    r.empty = 1;
    check(lococo_session_generate(session, NULL, max_tokens, print_token, &r, NULL));
    printf("\n");
    fflush(stdout);
  }
  lococo_session_destroy(session);
  lococo_model_close(model);
  return 0;
}
