// Compiled with -mavx2 -mavxvnni -mf16c -mfma.
#include "cpu_decode.h"
