"""The workloads of the report, in its order: one module each, and one row here."""

from benchmarks.workloads import (
    binary,
    counts,
    cuda,
    out_of_core,
    reduction,
    roofline,
    scaling,
    searches,
    sparse,
)

WORKLOADS = {
    module.WORKLOAD.name: module.WORKLOAD
    for module in (
        reduction,
        counts,
        binary,
        scaling,
        roofline,
        out_of_core,
        sparse,
        searches,
        cuda,
    )
}
