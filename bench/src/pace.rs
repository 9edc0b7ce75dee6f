//! Requests at a constant rate, whatever becomes of the ones before: enter a way and a rate, leave how long
//! each answer took since the moment its request was *due*.
//!
//! A client that waits for an answer before it asks again asks less just when the other side is slow, and so
//! hides the delays it would have seen. Here the moments are fixed before the first request; one that finds
//! every client busy waits, and its waiting counts.

use std::{
    cell::RefCell,
    rc::Rc,
    thread,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Mutex, mpsc},
    task::LocalSet,
};

use crate::{
    client::{Client, Target},
    upstream,
};

/// The direct way and the tunnel take turns so often in one measurement.
const TURNS: u32 = 4;

/// What to send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// How many connections there are: so many requests at the most are under way.
    pub(crate) clients: usize,
    /// Requests in a second, over all of them.
    pub(crate) rate: u32,
    /// How long, each way.
    pub(crate) time: Duration,
}

/// How it went.
#[derive(Debug, Default)]
pub(crate) struct Paced {
    /// Milliseconds from the moment a request was due until its answer was there.
    pub(crate) delays: Vec<f64>,
    /// Requests without an answer of their own.
    pub(crate) errors: u64,
}

/// Sends them both ways, in turns: (direct, through the tunnel).
pub(crate) async fn both(direct: &Target, tunnel: &Target, pace: Pace) -> anyhow::Result<(Paced, Paced)> {
    let mut both = (Paced::default(), Paced::default());
    let turn = Pace { time: pace.time / TURNS, ..pace };
    for _ in 0..TURNS {
        for (way, paced) in [(direct, &mut both.0), (tunnel, &mut both.1)] {
            let more = one(way, turn).await?;
            paced.delays.extend(more.delays);
            paced.errors += more.errors;
        }
    }
    Ok(both)
}

async fn one(way: &Target, pace: Pace) -> anyhow::Result<Paced> {
    let mut clients = Vec::with_capacity(pace.clients);
    for _ in 0..pace.clients {
        // The first request on a connection is not like the others.
        let mut client = Client::connect(way).await?;
        client.call("/hello", None).await?;
        clients.push(client);
    }
    let paced = Rc::new(RefCell::new(Paced::default()));
    let dues = Rc::new(Mutex::new(dues(pace)));
    let set = LocalSet::new();
    for client in clients {
        let (way, dues, paced) = (way.clone(), Rc::clone(&dues), Rc::clone(&paced));
        set.spawn_local(async move {
            let mut client = Some(client);
            loop {
                let Some(due) = dues.lock().await.recv().await else { return };
                match ask(&way, &mut client).await {
                    Ok(()) => paced.borrow_mut().delays.push(due.elapsed().as_secs_f64() * 1e3),
                    Err(error) => {
                        eprintln!("error: {error:#}");
                        paced.borrow_mut().errors += 1;
                        client = None;
                    }
                }
            }
        });
    }
    set.await;
    Ok(paced.take())
}

/// The moments at which requests are due, each told when it has come.
///
/// A thread waits for them, because the runtime's timers count whole milliseconds, which would be most of what
/// is measured. It waits for nobody, so nothing bounds what is queued but the number of requests.
fn dues(pace: Pace) -> mpsc::UnboundedReceiver<Instant> {
    let (due, dues) = mpsc::unbounded_channel();
    let count = (pace.time.as_secs_f64() * f64::from(pace.rate)) as u32;
    let begun = Instant::now();
    thread::spawn(move || {
        for number in 0..count {
            let moment = begun + Duration::from_secs(1) * number / pace.rate;
            thread::sleep(moment.saturating_duration_since(Instant::now()));
            if due.send(moment).is_err() {
                return;
            }
        }
    });
    dues
}

async fn ask(way: &Target, client: &mut Option<Client>) -> anyhow::Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(Client::connect(way).await?),
    };
    let answer = client.call("/hello", None).await?;
    anyhow::ensure!(answer == upstream::HELLO, "a wrong answer");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    #[tokio::test]
    async fn nothing_is_due_early_and_nothing_is_left_out() {
        let begun = Instant::now();
        let mut dues = dues(Pace { clients: 1, rate: 1000, time: Duration::from_millis(5) });
        let mut all = Vec::new();
        while let Some(due) = dues.recv().await {
            assert!(Instant::now() >= due);
            all.push(due);
        }
        assert_eq!(all.len(), 5);
        assert!(all[0] >= begun);
        assert!(all.windows(2).all(|pair| pair[1] - pair[0] == Duration::from_millis(1)));
    }

    /// Answers each request after `pause`, one after the other.
    async fn slow(pause: Duration) -> Target {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut request = [0; 2048];
                    while stream.read(&mut request).await.is_ok_and(|read| read > 0) {
                        tokio::time::sleep(pause).await;
                        let body = upstream::HELLO;
                        let answer =
                            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        Target { address, host: "slow".to_owned() }
    }

    #[tokio::test]
    async fn what_waits_for_a_busy_client_counts_from_when_it_was_due() {
        let way = slow(Duration::from_millis(20)).await;
        // 10 requests are due within 10 ms, and one client takes 20 ms for each: the last one waits for nine.
        let pace = Pace { clients: 1, rate: 1000, time: Duration::from_millis(10) };
        let paced = one(&way, pace).await.unwrap();
        assert_eq!((paced.delays.len(), paced.errors), (10, 0));
        let longest = paced.delays.iter().copied().fold(0.0, f64::max);
        assert!(longest >= 10.0 * 20.0 - 10.0, "{longest}");
    }

    #[tokio::test]
    async fn a_request_without_an_answer_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let way = Target { address: listener.local_addr().unwrap(), host: "gone".to_owned() };
        tokio::spawn(async move {
            // One answer, then nothing but closed connections.
            for number in 0.. {
                let (mut stream, _) = listener.accept().await.unwrap();
                if number == 0 {
                    let _ = stream.read(&mut [0; 2048]).await;
                    let body = upstream::HELLO;
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        });
        let pace = Pace { clients: 1, rate: 1000, time: Duration::from_millis(3) };
        let paced = one(&way, pace).await.unwrap();
        assert_eq!((paced.delays.len(), paced.errors), (0, 3));
    }
}
