//! The parts of a measurement, and what each says about itself.

/// Every part, and what it measures.
pub(crate) const PARTS: [(&str, &str); 13] = [
    (
        "latency",
        "One small request after the other, and at a constant rate: then a delay counts from the moment the request was due, \
         so that one slow answer shows in all that wait behind it.",
    ),
    (
        "load",
        "Clients that ask again as soon as they have their answer; each answer must be its own. The generator shares the machine, so a \
         rate is what the whole path costs.",
    ),
    ("events", "How long a server-sent event is on its way."),
    ("first-byte", "From the request to the first byte of a body that comes slowly."),
    ("download", "Bodies of bytes that do not compress, one after the other; each byte is compared."),
    (
        "upload",
        "Bodies of bytes that do not compress. An event of Lambda holds 6 MB, which is 4.5 MB in base64; what is larger is answered with \
         413 before it is read.",
    ),
    ("memory", "Resident memory of each kind of process, the largest where there are several."),
    (
        "start",
        "A function's process from its start until it asks for an event, and from its first event until that is answered, with `local` in \
         the place of Lambda.",
    ),
    (
        "agent",
        "`agentd` alone: a bare edge keeps it busy over one WebSocket. No AWS hop, no TLS: what compares with other tunnels' agents.",
    ),
    (
        "aws",
        "`local --latency aws`, and the two designs it replaces under the same latencies: what each adds to what the upstream takes itself, \
         8 requests under way.",
    ),
    (
        "scale",
        "Agents on one `local`, each a process; and requests that the upstream holds for 2 s, all sent at once.",
    ),
    ("hops", "Where the time of one request goes, one request at a time."),
    ("compression", "What compression on the link saves and costs."),
];

/// What a part measures.
pub(crate) fn method_of(part: &str) -> &'static str {
    PARTS.iter().find(|one| one.0 == part).map_or("", |one| one.1)
}
