// Entry points of the GPU back end. Compiled at run time for the device at hand.
#define MACHINE_WARP 1
#include "engine_w.cuh"

// Where the VM's translations are kept from slice to slice.
FN u64 *saved_of(const Pool *pool, u32 vm) {
    return pool->saved_ptr ? (u64 *)(uintptr_t)pool->saved_ptr + (u64)vm * SAVED_WORDS : 0;
}
FN void saved_forget(const Pool *pool, u32 vm) {
    u64 *saved = saved_of(pool, vm);
    if (saved && threadIdx.x == 0) saved[SAVED_WORDS - 1] = 0;
}

// Gives VMs first_vm, first_vm + 1, ... (one block each) the frame table that every VM starts with.
extern "C" __global__ void machine_setup(Vm *vms, u32 *tables, const u32 *initial_table, Pool *pool,
                                         u32 first_vm, u32 count) {
    u32 i = blockIdx.x;
    if (i >= count) return;
    Vm &vm = vms[first_vm + i];
    saved_forget(pool, first_vm + i);
    u32 *table = (u32 *)(uintptr_t)vm.ram.table_ptr;
    for (u32 page = threadIdx.x; page < vm.ram.pages; page += blockDim.x) table[page] = initial_table[page];
}

// Runs one slice for each entry of the list, VMS_PER_WARP of them in each warp.
extern "C" __global__ void machine_run_w(Vm *vms, Pool *pool, Mailbox *mail, const GpuSlice *list, u32 count,
                                         SliceResult *results, u32 lessons) {
    u32 warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = warp_lane();
    u32 first = warp_or(warp) * VMS_PER_WARP; // so that the compiler knows that no lane goes another way
    if (first >= count) return;
    VmSlot *slots = warp_slots();
    if (lane < VMS_PER_WARP) {
        u32 i = first + lane < count ? first + lane : first;
        const GpuSlice slice = list[i]; // at once: it is in the host's memory
        Vm *vm = first + lane < count ? &vms[slice.vm] : 0;
        slot_open(&slots[lane], vm, pool, &mail[slice.vm], saved_of(pool, slice.vm), slice.request,
                  &results[i], slice.cycles);
    }
    warp_sync();
    warp_slices(slots, lessons);
}

// Gives the VM's own frames back and restores its frame table. The VM is in no launch; the host then writes
// its state.
extern "C" __global__ void machine_reset(Vm *vms, Pool *pool, const u32 *initial_table, u32 number) {
    Vm &vm = vms[number];
    saved_forget(pool, number);
    u32 *table = (u32 *)(uintptr_t)vm.ram.table_ptr;
    u32 *ring = (u32 *)(uintptr_t)pool->ring_ptr;
    u32 *codes = (u32 *)(uintptr_t)pool->code_of_ptr;
    for (u32 page = threadIdx.x; page < vm.ram.pages; page += blockDim.x) {
        u32 entry = table[page];
        table[page] = initial_table[page];
        if (!(entry & FRAME_PRIVATE)) continue;
        u32 frame = entry & FRAME_MASK;
        codes[frame] = 0;
        // The slot is written before the tail that publishes it could be seen by a taker: no launch runs
        // beside this one that takes frames of this device's pool.
        u64 tail = atomicAdd((unsigned long long *)&pool->tail, 1ull);
        ring[tail % pool->capacity] = frame;
    }
}

// Forgets all texts and traces. No launch runs beside this one.
extern "C" __global__ void machine_forget_code(Pool *pool, u32 frames) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
    u32 *table = (u32 *)(uintptr_t)pool->text_table_ptr, *codes = (u32 *)(uintptr_t)pool->code_of_ptr;
    for (u32 i = at; i < pool->text_slots; i += all) table[i] = 0;
    for (u32 i = at; i < frames; i += all) codes[i] = 0;
    if (at == 0) pool->text_count = pool->trace_count = CODE_FIRST, pool->code_epoch++;
}
