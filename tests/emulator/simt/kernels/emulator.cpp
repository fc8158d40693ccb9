// The emulator as one source: most of what it takes to compile are the headers of the standard library.
#include "simt/barriers.cpp"
#include "simt/fiber.cpp"
#include "simt/machine.cpp"
#include "simt/races.cpp"
#include "simt/traffic.cpp"
#include "simt/warp.cpp"
#include "simt/watch.cpp"
