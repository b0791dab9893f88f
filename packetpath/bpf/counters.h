/* One number a reason, for each CPU its own. The program names them in an enum that ends with COUNTERS. */
#ifndef NODEPLANE_BPF_COUNTERS_H
#define NODEPLANE_BPF_COUNTERS_H

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

always_inline void count(__u32 index, __u64 by)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &index);

	if (value)
		*value += by;
}

always_inline int dropped(__u32 why)
{
	count(why, 1);
	return TC_ACT_SHOT;
}

always_inline int passed_on(__u32 why)
{
	count(why, 1);
	return NEXT;
}

#endif
