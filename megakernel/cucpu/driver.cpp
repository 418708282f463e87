// One launch as a process of its own, for the asan and tsan flavours: argv[1] holds the request that checked.py wrote,
// argv[2] gets the outcome. Every buffer is an allocation of exactly its size, aligned as cudaMalloc aligns.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" int cucpu_launch(const char* kernel, const void* args, unsigned blocks, unsigned threads, size_t shared_bytes,
                            unsigned resident_blocks, uint64_t seed, double deadlock_seconds, char* message,
                            size_t message_size);
extern "C" size_t cucpu_args_size(const char* kernel);

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "cucpu driver: %s\n", what);
  exit(2);
}

// The request: one line of numbers, then the sizes of the buffers, the pointers, and the bytes.
struct Request {
  char kernel[256];
  unsigned blocks, threads, resident;
  size_t shared_bytes, args_bytes, buffers, pointers;
  uint64_t seed;
  double deadlock_seconds;
};

// args[at] is to become the address of buffer + offset.
struct Pointer {
  size_t at, buffer, offset;
};

}  // namespace

int main(int argc, char** argv) {
  require(argc == 3, "wanted the paths of a request and of an outcome");
  FILE* in = fopen(argv[1], "rb");
  require(in != nullptr, "cannot open the request");
  Request r;
  require(fscanf(in, "%255s %u %u %zu %u %lu %lf %zu %zu %zu", r.kernel, &r.blocks, &r.threads, &r.shared_bytes, &r.resident,
                 &r.seed, &r.deadlock_seconds, &r.args_bytes, &r.buffers, &r.pointers) == 10, "the request's head is broken");
  std::vector<size_t> sizes(r.buffers);
  for (size_t& size : sizes) require(fscanf(in, "%zu", &size) == 1, "a buffer's size is missing");
  std::vector<Pointer> pointers(r.pointers);
  for (Pointer& p : pointers) require(fscanf(in, "%zu %zu %zu", &p.at, &p.buffer, &p.offset) == 3, "a pointer is missing");
  require(fgetc(in) == '\n', "the request's head does not end");

  std::vector<char> args(r.args_bytes);
  require(fread(args.data(), 1, args.size(), in) == args.size(), "the arguments are cut short");
  std::vector<char*> buffers;
  for (size_t size : sizes) {
    void* memory;
    require(posix_memalign(&memory, 256, size) == 0, "no memory for a buffer");
    require(fread(memory, 1, size, in) == size, "a buffer is cut short");
    buffers.push_back(static_cast<char*>(memory));
  }
  fclose(in);
  for (const Pointer& p : pointers) *reinterpret_cast<char**>(&args[p.at]) = buffers[p.buffer] + p.offset;

  std::string message(1 << 16, '\0');
  int code = 1;
  const size_t wanted = cucpu_args_size(r.kernel);
  if (wanted && wanted != args.size()) {
    snprintf(&message[0], message.size(), "kernel %s takes %zu bytes of arguments, got %zu", r.kernel, wanted, args.size());
  } else {
    code = cucpu_launch(r.kernel, args.data(), r.blocks, r.threads, r.shared_bytes, r.resident, r.seed, r.deadlock_seconds,
                        &message[0], message.size());
  }

  FILE* out = fopen(argv[2], "wb");
  require(out != nullptr, "cannot open the outcome");
  fprintf(out, "%d\n", code);
  if (code == 0) {
    for (size_t i = 0; i < sizes.size(); i++) require(fwrite(buffers[i], 1, sizes[i], out) == sizes[i], "the disk is full");
  } else {
    fputs(message.c_str(), out);
  }
  require(fclose(out) == 0, "the disk is full");
}
