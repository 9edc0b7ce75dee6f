use super::*;
use crate::chaos::ChaosConfig;

async fn with_queue(chaos: ChaosConfig, attributes: QueueAttributes) -> (Arc<Sqs>, String) {
    let sqs = Arc::new(Sqs::new("http://127.0.0.1:1", Arc::new(Chaos::new(chaos))));
    let url = sqs.create("mailbox", attributes).unwrap();
    tokio::time::advance(limits::MAILBOX_WARM_UP).await;
    (sqs, url)
}

async fn queue() -> (Arc<Sqs>, String) {
    with_queue(ChaosConfig::default(), QueueAttributes::default()).await
}

fn message(body: &str) -> NewMessage {
    NewMessage { body: body.into(), ..NewMessage::default() }
}

fn waiting(secs: u64) -> ReceiveRequest {
    ReceiveRequest { max: 10, wait: Some(Duration::from_secs(secs)), visibility: None }
}

fn bodies(received: &[Received]) -> Vec<&str> {
    received.iter().map(|received| &*received.message.body).collect()
}

async fn receive(sqs: &Sqs, url: &str) -> Vec<Received> {
    sqs.receive(url, waiting(0)).await.unwrap()
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> SqsErrorKind {
    result.unwrap_err().kind
}

#[tokio::test(start_paused = true)]
async fn a_received_message_is_hidden_until_it_is_deleted_or_comes_back() {
    let (sqs, url) = queue().await;
    sqs.send(&url, message("a")).unwrap();
    let first = receive(&sqs, &url).await;
    assert_eq!((bodies(&first), first[0].receives), (vec!["a"], 1));
    assert!(receive(&sqs, &url).await.is_empty());
    tokio::time::advance(Duration::from_secs(30)).await;
    let second = receive(&sqs, &url).await;
    assert_eq!(second[0].receives, 2);
    assert_ne!(first[0].receipt, second[0].receipt);
    // The older receipt deletes nothing any more.
    sqs.delete(&url, &first[0].receipt).unwrap();
    tokio::time::advance(Duration::from_secs(30)).await;
    let third = receive(&sqs, &url).await;
    assert_eq!(bodies(&third), ["a"]);
    sqs.delete(&url, &third[0].receipt).unwrap();
    sqs.delete(&url, &third[0].receipt).unwrap();
    tokio::time::advance(Duration::from_secs(60)).await;
    assert!(receive(&sqs, &url).await.is_empty());
    assert_eq!(sqs.queue(&url).unwrap().stock().bytes, 0);
}

#[tokio::test(start_paused = true)]
async fn a_visible_message_can_still_be_deleted_by_whoever_received_it_last() {
    let (sqs, url) = queue().await;
    sqs.send(&url, message("a")).unwrap();
    let received = receive(&sqs, &url).await;
    tokio::time::advance(Duration::from_secs(31)).await;
    sqs.queue(&url).unwrap().stock().refresh(Instant::now());
    sqs.delete(&url, &received[0].receipt).unwrap();
    assert!(receive(&sqs, &url).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_long_poll_wakes_at_once() {
    let (sqs, url) = queue().await;
    let start = Instant::now();
    let poll = tokio::spawn({
        let (sqs, url) = (Arc::clone(&sqs), url.clone());
        async move { sqs.receive(&url, waiting(20)).await }
    });
    sqs.watch_waiting(&url).unwrap().wait_for(|count| *count == 1).await.unwrap();
    tokio::time::advance(Duration::from_secs(3)).await;
    sqs.send(&url, message("a")).unwrap();
    assert_eq!(bodies(&poll.await.unwrap().unwrap()), ["a"]);
    assert_eq!(start.elapsed(), Duration::from_secs(3));
    // And an empty one ends after its time.
    let start = Instant::now();
    assert!(sqs.receive(&url, waiting(20)).await.unwrap().is_empty());
    assert_eq!(start.elapsed(), Duration::from_secs(20));
}

#[tokio::test(start_paused = true)]
async fn a_long_poll_sees_a_message_come_back() {
    let (sqs, url) = queue().await;
    sqs.send(&url, message("a")).unwrap();
    let request = ReceiveRequest { visibility: Some(Duration::from_secs(5)), ..waiting(20) };
    let start = Instant::now();
    assert_eq!(sqs.receive(&url, request).await.unwrap().len(), 1);
    let again = sqs.receive(&url, request).await.unwrap();
    assert_eq!((again.len(), start.elapsed()), (1, Duration::from_secs(5)));
    let end_now = sqs.change_visibility(&url, &again[0].receipt, Duration::ZERO);
    assert_eq!(end_now, Ok(()));
    assert_eq!(sqs.receive(&url, request).await.unwrap().len(), 1);
    assert_eq!(
        kind(sqs.change_visibility(&url, &again[0].receipt, Duration::ZERO)),
        SqsErrorKind::MessageNotInflight
    );
}

#[tokio::test(start_paused = true)]
async fn a_poll_that_is_given_up_takes_no_message_with_it() {
    let (sqs, url) = queue().await;
    let poll = tokio::spawn({
        let (sqs, url) = (Arc::clone(&sqs), url.clone());
        async move { sqs.receive(&url, waiting(20)).await }
    });
    let mut count = sqs.watch_waiting(&url).unwrap();
    count.wait_for(|count| *count == 1).await.unwrap();
    poll.abort();
    count.wait_for(|count| *count == 0).await.unwrap();
    sqs.send(&url, message("a")).unwrap();
    assert_eq!(bodies(&receive(&sqs, &url).await), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn delays_and_retention_are_kept() {
    let attributes = QueueAttributes { retention: Duration::from_secs(60), ..QueueAttributes::default() };
    let (sqs, url) = with_queue(ChaosConfig::default(), attributes).await;
    sqs.send(&url, NewMessage { delay: Duration::from_secs(2), ..message("late") }).unwrap();
    sqs.send(&url, message("early")).unwrap();
    assert_eq!(bodies(&receive(&sqs, &url).await), ["early"]);
    assert_eq!(bodies(&sqs.receive(&url, waiting(5)).await.unwrap()), ["late"]);
    sqs.send(&url, message("old")).unwrap();
    tokio::time::advance(Duration::from_secs(60)).await;
    assert!(receive(&sqs, &url).await.is_empty());
    let too_late = NewMessage { delay: Duration::from_secs(901), ..message("x") };
    assert_eq!(kind(sqs.send(&url, too_late)), SqsErrorKind::InvalidParameterValue);
}

#[tokio::test(start_paused = true)]
async fn names_are_usable_late_and_blocked_after_deletion() {
    let sqs = Sqs::new("http://127.0.0.1:1", Arc::default());
    let url = sqs.create("m", QueueAttributes::default()).unwrap();
    assert_eq!(url, "http://127.0.0.1:1/000000000000/m");
    assert_eq!(kind(sqs.send(&url, message("a"))), SqsErrorKind::QueueDoesNotExist);
    tokio::time::advance(limits::MAILBOX_WARM_UP).await;
    sqs.send(&url, message("a")).unwrap();
    assert!(sqs.create("m", QueueAttributes::default()).is_ok());
    let other = QueueAttributes { visibility: Duration::from_secs(1), ..QueueAttributes::default() };
    assert_eq!(kind(sqs.create("m", other.clone())), SqsErrorKind::QueueNameExists);
    sqs.delete_queue(&url).unwrap();
    assert_eq!(kind(sqs.send(&url, message("a"))), SqsErrorKind::QueueDoesNotExist);
    assert_eq!(kind(sqs.create("m", other.clone())), SqsErrorKind::QueueDeletedRecently);
    tokio::time::advance(NAME_BLOCKED).await;
    assert!(sqs.create("m", other).is_ok());
    for bad in ["", "a b", "x.fifo", &"a".repeat(81)] {
        assert_eq!(kind(sqs.create(bad, QueueAttributes::default())), SqsErrorKind::InvalidParameterValue);
    }
}

#[tokio::test(start_paused = true)]
async fn deleting_a_queue_ends_who_waits_for_it() {
    let (sqs, url) = queue().await;
    let poll = tokio::spawn({
        let (sqs, url) = (Arc::clone(&sqs), url.clone());
        async move { sqs.receive(&url, waiting(20)).await }
    });
    sqs.watch_waiting(&url).unwrap().wait_for(|count| *count == 1).await.unwrap();
    sqs.delete_queue(&url).unwrap();
    assert_eq!(kind(poll.await.unwrap()), SqsErrorKind::QueueDoesNotExist);
}

#[tokio::test(start_paused = true)]
async fn refuses_what_the_service_refuses() {
    let (sqs, url) = queue().await;
    let send = |body: &str| sqs.send(&url, message(body));
    let largest = "x".repeat(limits::MAILBOX_MESSAGE_BYTES);
    assert!(send(&largest).is_ok());
    assert_eq!(kind(send(&format!("{largest}x"))), SqsErrorKind::InvalidParameterValue);
    assert_eq!(kind(send("")), SqsErrorKind::MissingParameter);
    for bad in ["\u{0}", "a\u{1f}b", "\u{b}", "\u{fffe}", "\u{ffff}"] {
        assert_eq!(kind(send(bad)), SqsErrorKind::InvalidMessageContents, "{bad:?}");
    }
    for good in ["\t\r\n", "\u{7f}", "\u{fffd}", "\u{10000}", "\u{1f600}", "\u{d7ff}\u{e000}"] {
        assert!(send(good).is_ok(), "{good:?}");
    }
    let with = |attribute: Attribute, name: &str| {
        let attributes = BTreeMap::from([(name.into(), attribute)]);
        sqs.send(&url, NewMessage { attributes, ..message("x") })
    };
    assert!(with(Attribute::text("v"), "request_id").is_ok());
    assert_eq!(kind(with(Attribute::text(""), "a")), SqsErrorKind::InvalidParameterValue);
    assert_eq!(kind(with(Attribute::text("\u{1}"), "a")), SqsErrorKind::InvalidMessageContents);
    assert_eq!(kind(with(Attribute::text("v"), "a b")), SqsErrorKind::InvalidParameterValue);
    // Attributes count: name, type and value.
    let nearly = "x".repeat(limits::MAILBOX_MESSAGE_BYTES - 10);
    let attributes = BTreeMap::from([("name".into(), Attribute::text("v"))]);
    assert_eq!(
        kind(sqs.send(&url, NewMessage { attributes, ..message(&nearly) })),
        SqsErrorKind::InvalidParameterValue
    );
    assert_eq!(kind(sqs.receive(&url, waiting(21)).await), SqsErrorKind::InvalidParameterValue);
    let eleven = ReceiveRequest { max: 11, ..waiting(0) };
    assert_eq!(kind(sqs.receive(&url, eleven).await), SqsErrorKind::InvalidParameterValue);
    assert_eq!(kind(sqs.delete(&url, "nonsense")), SqsErrorKind::ReceiptHandleIsInvalid);
    assert_eq!(kind(sqs.receive("http://elsewhere/m", waiting(0)).await), SqsErrorKind::QueueDoesNotExist);
}

#[tokio::test(start_paused = true)]
async fn a_receipt_belongs_to_its_queue() {
    let (sqs, url) = queue().await;
    sqs.send(&url, message("a")).unwrap();
    let received = receive(&sqs, &url).await;
    let other = sqs.create("other", QueueAttributes::default()).unwrap();
    tokio::time::advance(limits::MAILBOX_WARM_UP).await;
    assert_eq!(kind(sqs.delete(&other, &received[0].receipt)), SqsErrorKind::ReceiptHandleIsInvalid);
}

#[tokio::test(start_paused = true)]
async fn bad_days_duplicate_reorder_and_throttle() {
    let (sqs, url) =
        with_queue(ChaosConfig::default().with(Fault::Duplicate, 1.0), QueueAttributes::default()).await;
    sqs.send(&url, message("a")).unwrap();
    let received = receive(&sqs, &url).await;
    assert_eq!(bodies(&received), ["a", "a"]);
    assert_ne!(received[0].receipt, received[1].receipt);

    let chaos = "seed=3,reorder=0.5".parse().unwrap();
    let (sqs, url) = with_queue(chaos, QueueAttributes::default()).await;
    for body in 0..10 {
        sqs.send(&url, message(&body.to_string())).unwrap();
    }
    let mut order = Vec::new();
    while order.len() < 10 {
        let received = sqs.receive(&url, waiting(1)).await.unwrap();
        order.extend(received.iter().map(|received| received.message.body.clone()));
    }
    let mut sorted = order.clone();
    sorted.sort();
    assert_ne!(order, sorted);
    assert_eq!(sorted.concat(), "0123456789");

    let (sqs, url) =
        with_queue(ChaosConfig::default().with(Fault::Lose, 1.0), QueueAttributes::default()).await;
    sqs.send(&url, message("a")).unwrap();
    assert!(sqs.receive(&url, waiting(10)).await.unwrap().is_empty(), "its sender knows nothing of it");

    let (sqs, url) =
        with_queue(ChaosConfig::default().with(Fault::Throttle, 0.5), QueueAttributes::default()).await;
    let throttled = (0..100).filter(|_| sqs.send(&url, message("a")).is_err()).count();
    assert!((30..70).contains(&throttled), "{throttled}");
}

#[tokio::test(start_paused = true)]
async fn what_is_received_too_often_goes_to_the_dead_letters_and_back() {
    let sqs = Sqs::new("http://127.0.0.1:1", Arc::default());
    let dead = sqs.create_kept("dead", QueueAttributes::default()).unwrap();
    let letters = DeadLetters { queue: "dead".into(), max_receives: 2 };
    let attributes = QueueAttributes { dead_letters: Some(letters), ..QueueAttributes::default() };
    let url = sqs.create_kept("work", attributes.clone()).unwrap();
    let id = sqs.send(&url, message("a")).unwrap().id.clone();
    for receives in 1..=2 {
        assert_eq!(receive(&sqs, &url).await[0].receives, receives);
        tokio::time::advance(Duration::from_secs(30)).await;
    }
    assert!(receive(&sqs, &url).await.is_empty());
    let letter = &receive(&sqs, &dead).await[0];
    assert_eq!((&*letter.message.body, &*letter.message.id), ("a", &*id));
    // In flight: it stays.
    assert_eq!(sqs.move_dead_letters("dead", None), Ok(0));
    tokio::time::advance(Duration::from_secs(30)).await;
    assert_eq!(sqs.move_dead_letters("dead", None), Ok(1));
    assert!(receive(&sqs, &dead).await.is_empty());
    let back = &receive(&sqs, &url).await[0];
    assert_eq!((&*back.message.body, back.receives), ("a", 1));
    assert_ne!(*back.message.id, *id, "it is a new message");

    // What was sent there goes where it is told to, and nowhere by itself; nor does anything with it.
    sqs.send(&dead, message("b")).unwrap();
    assert_eq!(kind(sqs.move_dead_letters("dead", None)), SqsErrorKind::InvalidParameterValue);
    assert_eq!(sqs.move_dead_letters("dead", Some("work")), Ok(1));
    assert_eq!(&*receive(&sqs, &url).await[0].message.body, "b");

    assert_eq!(kind(sqs.move_dead_letters("work", None)), SqsErrorKind::InvalidParameterValue);
    assert_eq!(kind(sqs.move_dead_letters("none", None)), SqsErrorKind::QueueDoesNotExist);
    sqs.create_kept("other", attributes).unwrap();
    assert_eq!(kind(sqs.move_dead_letters("dead", None)), SqsErrorKind::InvalidParameterValue);
    assert_eq!(sqs.move_dead_letters("dead", Some("other")), Ok(0));
}

#[tokio::test(start_paused = true)]
async fn lasting_queues_outlive_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let begin = || {
        let sqs = Sqs::new("http://127.0.0.1:1", Arc::default());
        let dead = sqs.create_kept("dead", QueueAttributes::default()).unwrap();
        let letters = DeadLetters { queue: "dead".into(), max_receives: 2 };
        let attributes = QueueAttributes { dead_letters: Some(letters), ..QueueAttributes::default() };
        let work = sqs.create_kept("work", attributes).unwrap();
        let changes = crate::store::read(&path).unwrap();
        sqs.take_over(changes.iter().map(|change| &*change.record)).unwrap();
        sqs.keep(Store::create(&path, |file| sqs.fill(file)).unwrap());
        (sqs, work, dead)
    };
    let (sqs, work, dead) = begin();
    sqs.create("mailbox", QueueAttributes::default()).unwrap();
    tokio::time::advance(limits::MAILBOX_WARM_UP).await;
    sqs.send(&sqs.url("mailbox"), message("not kept")).unwrap();
    let attributes = BTreeMap::from([
        ("text".into(), Attribute::text("t")),
        (
            "bytes".into(),
            Attribute { data_type: "Binary".into(), value: AttributeValue::Binary([0, 255].into()) },
        ),
    ]);
    sqs.send(&work, NewMessage { body: "a".into(), attributes: attributes.clone(), delay: Duration::ZERO })
        .unwrap();
    for body in ["b", "c"] {
        sqs.send(&work, message(body)).unwrap();
    }
    let received = receive(&sqs, &work).await;
    sqs.delete(&work, &received[1].receipt).unwrap();

    let (sqs, work, _) = begin();
    assert!(sqs.send(&sqs.url("mailbox"), message("x")).is_err());
    let received = receive(&sqs, &work).await;
    assert_eq!(bodies(&received), ["a", "c"]);
    assert_eq!(received[0].message.attributes, attributes);
    for _ in 0..2 {
        tokio::time::advance(Duration::from_secs(30)).await;
        receive(&sqs, &work).await;
    }
    let (sqs, work, dead_again) = begin();
    assert_eq!(dead, dead_again);
    assert!(receive(&sqs, &work).await.is_empty());
    assert_eq!(receive(&sqs, &dead).await.len(), 2);
    // Where they came from is known still.
    let (sqs, work, _) = begin();
    assert_eq!(sqs.move_dead_letters("dead", None), Ok(2));
    assert_eq!(bodies(&receive(&sqs, &work).await), ["a", "c"]);
    sqs.send(&dead, message("d")).unwrap();
    sqs.purge(&dead).unwrap();
    let (sqs, ..) = begin();
    assert!(receive(&sqs, &dead).await.is_empty());
}
