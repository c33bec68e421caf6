/* Which of the instruction sets that compile.py knows this processor and its system run. Part of native.c, compiled for any
   processor of the kind.

   x86 says it by CPUID, and by XGETBV whether the system keeps the registers; ARM systems tell programs. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { YMM = 0x06, ZMM = 0xe6, TILE = 0x60000 }; /* states that the system keeps: SSE and AVX; and AVX-512's; AMX's */

static uint64_t kept_states(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* OSXSAVE */
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

static int keeps(uint64_t states) { return (kept_states() & states) == states; }

/* Bit `bit` of register r (0 eax, 1 ebx, 2 ecx, 3 edx) of a leaf. */
static int cpuid_bit(unsigned leaf, unsigned sub, int r, int bit) {
    unsigned v[4];
    return __get_cpuid_count(leaf, sub, &v[0], &v[1], &v[2], &v[3]) && (v[r] >> bit & 1);
}

static int runs_avx2(void) { /* and FMA, F16C */
    return keeps(YMM) && cpuid_bit(7, 0, 1, 5) && cpuid_bit(1, 0, 2, 12) && cpuid_bit(1, 0, 2, 29);
}

static int runs_avxvnni(void) { return runs_avx2() && cpuid_bit(7, 1, 0, 4); }

static int runs_avx512(void) { /* F, DQ, BW, VL */
    return runs_avx2() && keeps(ZMM) && cpuid_bit(7, 0, 1, 16) && cpuid_bit(7, 0, 1, 17) && cpuid_bit(7, 0, 1, 30) &&
           cpuid_bit(7, 0, 1, 31);
}

static int runs_avx512vnni(void) { return runs_avx512() && cpuid_bit(7, 0, 2, 11); }

static int runs_avx512bf16(void) { return runs_avx512vnni() && cpuid_bit(7, 1, 0, 5); }

/* Linux keeps tiles for programs that have asked, once for all their threads. Elsewhere nobody has tried. */
static int tiles_granted(void) {
#if defined(__linux__)
    return !syscall(SYS_arch_prctl, 0x1023, 18); /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
#else
    return 0;
#endif
}

static int runs_amx(void) { /* BF16, TILE, INT8 */
    return runs_avx512bf16() && keeps(ZMM | TILE) && cpuid_bit(7, 0, 3, 22) && cpuid_bit(7, 0, 3, 24) &&
           cpuid_bit(7, 0, 3, 25) && tiles_granted();
}

#elif defined(__aarch64__) && defined(__linux__)

#include <sys/auxv.h>

static int runs_neondot(void) { return getauxval(16) >> 20 & 1; } /* AT_HWCAP, HWCAP_ASIMDDP */

static int runs_neoni8mm(void) { return runs_neondot() && (getauxval(26) >> 13 & 1); } /* AT_HWCAP2, HWCAP2_I8MM */

#elif defined(__aarch64__) && defined(__APPLE__)

#include <sys/sysctl.h>

static int has(const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(feature, &value, &size, 0, 0) && value;
}

static int runs_neondot(void) { return has("hw.optional.arm.FEAT_DotProd"); }

static int runs_neoni8mm(void) { return runs_neondot() && has("hw.optional.arm.FEAT_I8MM"); }

#endif

/* 1 if the instruction set of this name runs here, 0 if not, or if nobody knows it on processors of this kind. */
int octad_runs(const char *isa) {
    if (!strcmp(isa, "portable")) return 1;
#if defined(__x86_64__)
    if (!strcmp(isa, "avx2")) return runs_avx2();
    if (!strcmp(isa, "avxvnni")) return runs_avxvnni();
    if (!strcmp(isa, "avx512")) return runs_avx512();
    if (!strcmp(isa, "avx512vnni")) return runs_avx512vnni();
    if (!strcmp(isa, "avx512bf16")) return runs_avx512bf16();
    if (!strcmp(isa, "amx")) return runs_amx();
#elif defined(__aarch64__)
#if defined(__linux__) || defined(__APPLE__)
    if (!strcmp(isa, "neondot")) return runs_neondot();
    if (!strcmp(isa, "neoni8mm")) return runs_neoni8mm();
#endif
#endif
    return 0;
}
