//! Every number that both sides must agree on, with its source. Nothing else defines a limit.

use std::time::Duration;

/// The most bytes in one WebSocket frame.
///
/// API Gateway closes a connection that sends a longer frame with 1009
/// (API Gateway Developer Guide, "WebSocket quotas": frame size 32 KB).
pub const FRAME_BYTES: usize = 32 * 1024;

/// The most bytes in one WebSocket message, and in one POST to `@connections`.
///
/// API Gateway closes a connection that sends a longer message with 1009 and answers a longer
/// POST with 413 (API Gateway Developer Guide, "WebSocket quotas": message payload 128 KB).
pub const MESSAGE_BYTES: usize = 128 * 1024;

/// What is kept free in a message for everything that is not body: tag, token, numbers.
pub const ENVELOPE_BYTES: usize = 1024;

/// The most raw bytes of body in one chunk.
///
/// Base64 turns 3 bytes into 4, so this is what fits [`MESSAGE_BYTES`] beside the envelope.
pub const CHUNK_BYTES: usize = (MESSAGE_BYTES - ENVELOPE_BYTES) / 4 * 3;

/// The most bytes of a response head (status line aside: names, values and four bytes for each
/// field), so that it always fits one message beside its envelope, whatever its escaping costs.
pub const HEAD_BYTES: usize = 60 * 1024;

/// The most header fields in one request or response.
pub const HEADER_FIELDS: usize = 1000;

/// The most bytes of a Step Functions input, output or state
/// (Step Functions Developer Guide, "Service quotas": 262,144 bytes, hard).
pub const STATE_BYTES: usize = 256 * 1024;

/// The most bytes of an event that Lambda takes synchronously, request body in base64 included
/// (Lambda Developer Guide, "Lambda quotas": 6 MB).
pub const EVENT_BYTES: usize = 6 * 1024 * 1024;

/// The most raw bytes of a public request's body.
///
/// Lambda's event holds it in base64 beside the head ([`EVENT_BYTES`]); 4.5 MB is what is left when
/// 4 KB are kept for the head of an ordinary request. A request just below it with a larger
/// head is refused by the front itself.
pub const REQUEST_BODY_BYTES: usize = (EVENT_BYTES - 4 * 1024) / 4 * 3;

/// A connection on which nothing is sent for this long is closed by API Gateway
/// (API Gateway Developer Guide, "WebSocket quotas": idle connection timeout 10 minutes).
pub const CONNECTION_IDLE: Duration = Duration::from_secs(10 * 60);

/// A connection is closed by API Gateway when it is this old, whatever it is doing
/// (API Gateway Developer Guide, "WebSocket quotas": connection duration 2 hours).
pub const CONNECTION_LIFETIME: Duration = Duration::from_secs(2 * 60 * 60);

/// The longest a response may take: the longest run of a Lambda function
/// (Lambda Developer Guide, "Lambda quotas": function timeout 900 seconds).
pub const RESPONSE_DURATION: Duration = Duration::from_secs(15 * 60);

/// The most bytes of one streamed response
/// (Lambda Developer Guide, "Lambda quotas": 200 MB for a streamed response, since July 2025).
pub const RESPONSE_BYTES: u64 = 200 * 1024 * 1024;

/// How long before [`CONNECTION_LIFETIME`] an agent opens the next connection: the longest
/// response that may still be running on the old one, so that none is cut off.
pub const REPLACE_AHEAD: Duration = RESPONSE_DURATION;

/// The longest an Express run may take
/// (Step Functions Developer Guide, "Service quotas": 5 minutes, hard).
pub const RUN_DURATION: Duration = Duration::from_secs(5 * 60);

/// How long a public client waits for the head of a response unless configured otherwise.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest that [`REPLY_TIMEOUT`] may be configured to: the run's states before and after the
/// wait need the rest of [`RUN_DURATION`].
pub const REPLY_TIMEOUT_MAX: Duration = Duration::from_secs(290 - 20);

/// The longest a long poll of a mailbox may wait
/// (SQS Developer Guide, "ReceiveMessage": WaitTimeSeconds 0 to 20).
pub const MAILBOX_WAIT: Duration = Duration::from_secs(20);

/// The most bytes of one mailbox message with its attributes
/// (SQS Developer Guide, "Message quotas": 1 MiB).
pub const MAILBOX_MESSAGE_BYTES: usize = 1024 * 1024;

/// How long a received mailbox message stays hidden; a receive whose answer was lost delays the
/// message by this much.
pub const MAILBOX_VISIBILITY: Duration = Duration::from_secs(30);

/// How long a received mailbox message may wait to be deleted together with others: half of
/// [`MAILBOX_VISIBILITY`], because its deletion may take a while as well.
pub const MAILBOX_DELETE_AFTER: Duration = Duration::from_secs(15);

/// How long an unread mailbox message is kept: longer than the longest response, whose chunks may
/// wait there for as long as its public client takes none.
pub const MAILBOX_RETENTION: Duration = Duration::from_secs(20 * 60);

/// How long the news of a lost connection is held back (SQS DelaySeconds), so that it does not
/// overtake the last replies that were sent over it.
pub const LOST_DELAY: Duration = Duration::from_secs(1);

/// How long a tunnel name stays its owner's after it was last opened.
pub const NAME_HELD: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How far the clocks of who issues agents' tokens and of the edge may be apart: an identity is good for so
/// much longer than its token says.
pub const CLOCK_SKEW: Duration = Duration::from_secs(30);

/// How long a lease of a mailbox lasts: longer than the longest request, so that a mailbox never
/// changes hands while a request may still be answered through it.
pub const MAILBOX_LEASE: Duration = Duration::from_secs(40 * 60);

/// A new mailbox cannot be used for this long
/// (SQS API Reference, "CreateQueue": wait at least one second).
pub const MAILBOX_WARM_UP: Duration = Duration::from_secs(1);

/// How many free mailboxes are kept ready: so many processes of `ingress` can start at the same time
/// without one of them waiting for a queue to be made.
pub const MAILBOXES_KEPT: usize = 64;

/// How long a mailbox has been free before it may be deleted as surplus, so that a daily peak does not
/// make and delete the same number of queues several times an hour.
pub const MAILBOX_IDLE: Duration = Duration::from_secs(60 * 60);

/// How long no agent has wanted `relay` before it goes to sleep: longer than a dev server takes to start again.
pub const RELAY_REST: Duration = Duration::from_secs(10 * 60);

/// How often the mailboxes are swept and the agents counted.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// How many chunks of one response the agent may have sent without credit for them.
///
/// With [`CHUNK_BYTES`] this bounds what waits for one slow public client to about 3 MB, and lets
/// 30 MB/s through a path with 100 ms between a chunk and its credit.
pub const CHUNK_WINDOW: u32 = 32;

/// After how many written chunks `ingress` returns credit: a quarter of [`CHUNK_WINDOW`].
pub const CREDIT_EVERY: u32 = CHUNK_WINDOW / 4;

/// After how long without news of a response `ingress` asks the agent how far it is, and then again.
///
/// Nothing of it is paid while an answer flows; a stream of events that is silent pays for one small
/// message each way.
pub const PROBE_AFTER: Duration = Duration::from_secs(10);

/// How long a piece may be missing that is known to have been sent before the response is broken off.
///
/// Longer than [`MAILBOX_VISIBILITY`], so that it may still come when only its receive was lost. With
/// [`PROBE_AFTER`] a response whose last piece was lost ends within 45 seconds.
pub const PIECE_MISSING: Duration = Duration::from_secs(35);

/// How many body messages of one upload are posted at the same time.
pub const UPLOAD_PARALLEL: usize = 4;

/// In place of the length of a body that nobody knows: more than any body has, and an integer that every JSON reader
/// keeps.
pub const UNKNOWN_LENGTH: u64 = (1 << 53) - 1;

/// How many pieces of a streamed request body may be under way to the upstream.
pub const UPLOAD_WINDOW: u32 = 32;

/// After how many pieces given to the upstream the edge is told.
pub const UPLOAD_CREDIT_EVERY: u32 = 8;

/// How often an agent sends a heartbeat unless `welcome` says otherwise.
///
/// With [`HEARTBEAT_ANSWER`] a half-open link is noticed within 35 seconds, and
/// [`CONNECTION_IDLE`] is never reached.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(25);

/// How long the answer to a heartbeat, or to `hello`, may take.
pub const HEARTBEAT_ANSWER: Duration = Duration::from_secs(10);

/// How long the answer to a WebSocket ping may take before a heartbeat asks once more, where pings are answered.
pub const PING_ANSWER: Duration = Duration::from_secs(5);

/// While nothing goes on and pings are answered, one sign of life in so many is a heartbeat, five minutes apart: a ping costs
/// nothing, and only a message certainly counts against [`CONNECTION_IDLE`].
pub const PINGS_A_HEARTBEAT: u32 = 12;

/// How long after a refusal the edge is asked again: invocations that held the place are over by then. Twice as long the
/// next time.
pub const REFUSED_RETRY: Duration = Duration::from_millis(250);

/// How often a message that the edge could not take is sent again.
pub const REFUSED_TRIES: u32 = 3;

/// For how long a message that was sent may turn out to have been refused.
pub const REFUSED_WITHIN: Duration = Duration::from_secs(3);

/// How long one write to the WebSocket may take before the link counts as dead.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long opening a connection may take, from DNS to the end of the handshake.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// The most tunnels that one connection serves.
pub const TUNNELS_PER_CONNECTION: usize = 100;

/// The most bytes of a live request's task token on the wire.
pub const LIVE_TOKEN_BYTES: usize = 512;

/// The most bytes of a run's own task token
/// (Step Functions API Reference, "SendTaskSuccess": taskToken, 1 to 2,048 characters).
pub const TASK_TOKEN_BYTES: usize = 2048;

/// The most bytes of any task token on the wire: a delivery's has [`TASK_TOKEN_BYTES`] in it, in base64.
pub const TOKEN_BYTES: usize = 3 * 1024;

/// The longest body of a delivery that is kept in its row. Its bytes are paid for with each of the three changes of the row,
/// a piece with two writes and a read of its own and the time they take; about here one is as dear as the other.
pub const DELIVERY_ROW_BODY_BYTES: usize = 4 * 1024;

/// The most raw bytes of a body's piece in the table of deliveries, so that an item stays below DynamoDB's 400 KB
/// (DynamoDB Developer Guide, "Quotas": item size).
pub const DELIVERY_PIECE_BYTES: usize = 350_000;

/// The longest answer to a question about deliveries, so that it fits a message beside its envelope.
pub const DELIVERIES_ANSWER_BYTES: usize = 100 * 1024;

/// How often an agent says that it still works on a delivery.
pub const DELIVERY_PROGRESS: Duration = Duration::from_secs(10);

/// How long after `welcome` an agent whose tunnels have deliveries kept says `hello` once more: a run that looked for a
/// connection just before there was one has parked by then, and is woken.
pub const HELLO_ONCE_MORE: Duration = Duration::from_secs(2);

/// How many public requests one tunnel serves at the same time unless configured otherwise.
pub const MAX_CONCURRENT: u32 = 64;

/// How long the first message of a response waits for body that is about to follow the head, so
/// that a small response is one message and not two.
pub const HEAD_LINGER: Duration = Duration::from_millis(1);

/// The shortest time between two partly filled chunks of one response: what an upstream flushes
/// faster than this is sent together.
pub const CHUNK_LINGER: Duration = Duration::from_millis(2);

/// The longest that bytes of a response wait for what is expected to follow them where the way to the public client is long,
/// and [`CHUNK_LINGER`] more for what is late. Three of a language model's tokens, 20 ms apart, make one message.
pub const CHUNK_GATHER: Duration = Duration::from_millis(40);

/// The longest message of a public WebSocket unless configured otherwise. Jupyter sends 8 MB in one, and Socket.IO and
/// Tornado take 1 and 10 MB; tungstenite joins up to 64 MB.
pub const SOCKET_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// The longest that [`SOCKET_MESSAGE_BYTES`] may be configured to.
pub const SOCKET_MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How many public WebSockets one agent serves at the same time, and how many a tunnel unless configured otherwise.
pub const SOCKETS: u32 = 1000;

/// How many bytes of one WebSocket may be under way in one direction without acknowledgement, frames counted with their
/// overhead: as much as [`CHUNK_WINDOW`] chunks of a response.
pub const SOCKET_WINDOW_BYTES: usize = 3 * 1024 * 1024;

/// How many batches of one WebSocket may be under way in one direction.
pub const SOCKET_BATCHES: u32 = 256;

/// After how many bytes passed on they are acknowledged at once.
pub const SOCKET_ACK_BYTES: usize = SOCKET_WINDOW_BYTES / 4;

/// After how long at the latest what was passed on is acknowledged: by then mostly something has gone the other way.
pub const SOCKET_ACK_AFTER: Duration = Duration::from_secs(5);

/// From how many bytes on a message of a WebSocket is compressed where the other end can decode it.
pub const COMPRESS_SOCKET_FROM_BYTES: usize = 4 * 1024;

/// After how long without an acknowledgement a WebSocket's other end is asked what has come. With [`PIECE_MISSING`] a loss
/// is told within 45 seconds, the way of the question and of the close included.
pub const SOCKET_PROBE_AFTER: Duration = Duration::from_secs(8);

/// How long an upstream may take to answer a WebSocket's handshake. Several development servers never answer one for a
/// path that they do not know.
pub const SOCKET_HANDSHAKE: Duration = Duration::from_secs(10);

/// How old a public WebSocket may become. It is then closed as for a restart, and clients connect again.
pub const SOCKET_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// After how long without a word the agent asks whether a WebSocket's other end is still there: as long as CloudFront
/// leaves a silent one open (re:Post, "CloudFront WebSocket idle timeout": 10 minutes).
pub const SOCKET_ASK_AFTER: Duration = Duration::from_secs(10 * 60);

/// How long a WebSocket that has said its last word waits for the other side's.
pub const SOCKET_CLOSE: Duration = Duration::from_secs(5);

/// How an agent paces batches that answer nothing: each costs a message, an invocation and a queue's message.
pub const SOCKET_AGENT_INTERVAL: Duration = Duration::from_millis(200);

/// How the edge paces batches that answer nothing: each costs one message.
pub const SOCKET_EDGE_INTERVAL: Duration = Duration::from_millis(40);

/// How many batches go at once after a pause.
pub const SOCKET_BURST: u32 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_in_base64_fits_a_message() {
        assert!(CHUNK_BYTES.div_ceil(3) * 4 + ENVELOPE_BYTES <= MESSAGE_BYTES);
    }

    #[test]
    fn a_request_body_in_base64_fits_an_event() {
        assert!(REQUEST_BODY_BYTES.div_ceil(3) * 4 + 4 * 1024 <= EVENT_BYTES);
    }

    #[test]
    fn heartbeats_keep_the_connection_from_idling_and_notice_death_in_time() {
        assert!(HEARTBEAT_INTERVAL + HEARTBEAT_ANSWER < CONNECTION_IDLE);
        assert!(HEARTBEAT_INTERVAL + PING_ANSWER + HEARTBEAT_ANSWER <= Duration::from_secs(40));
        assert!(HEARTBEAT_INTERVAL * (PINGS_A_HEARTBEAT + 1) + HEARTBEAT_ANSWER < CONNECTION_IDLE);
    }

    #[test]
    fn a_response_begun_before_the_replacement_ends_before_the_connection_does() {
        assert!(REPLACE_AHEAD >= RESPONSE_DURATION);
        assert!(REPLACE_AHEAD < CONNECTION_LIFETIME);
    }

    #[test]
    fn a_lease_outlives_two_of_the_longest_requests() {
        assert!(MAILBOX_LEASE > RESPONSE_DURATION * 2);
    }

    #[test]
    fn chunks_outlive_the_slowest_response() {
        assert!(MAILBOX_RETENTION > RESPONSE_DURATION);
    }

    #[test]
    fn messages_are_deleted_before_they_are_visible_again() {
        assert!(MAILBOX_DELETE_AFTER * 2 <= MAILBOX_VISIBILITY);
    }

    #[test]
    fn what_a_process_leaves_in_its_mailbox_is_gone_before_the_lease_ends() {
        // A request begins with half a lease at least.
        assert!(MAILBOX_RETENTION <= MAILBOX_LEASE / 2);
    }

    #[test]
    fn a_piece_is_given_up_only_when_it_cannot_come_any_more() {
        assert!(PIECE_MISSING > MAILBOX_VISIBILITY);
    }

    #[test]
    fn a_streamed_upload_goes_on_before_its_window_is_closed() {
        const { assert!(UPLOAD_CREDIT_EVERY as usize + UPLOAD_PARALLEL < UPLOAD_WINDOW as usize) }
    }

    #[test]
    fn a_lost_message_of_a_websocket_shows_within_45_seconds() {
        assert!(SOCKET_PROBE_AFTER + PIECE_MISSING <= Duration::from_secs(43));
        assert!(SOCKET_ACK_AFTER < SOCKET_PROBE_AFTER, "who is only slow to acknowledge is not asked");
        const { assert!(SOCKET_ACK_BYTES + CHUNK_BYTES < SOCKET_WINDOW_BYTES) }
    }

    #[test]
    fn a_run_can_wait_for_its_reply() {
        assert!(REPLY_TIMEOUT <= REPLY_TIMEOUT_MAX);
        assert!(REPLY_TIMEOUT_MAX + MAILBOX_WAIT < RUN_DURATION);
    }
}
