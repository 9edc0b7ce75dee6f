//! How everything here that listens takes its connections.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    time,
};

/// How long nothing is accepted after it could not be.
const PAUSE: Duration = Duration::from_millis(10);

/// The next connection of `whose`. What cannot be accepted, most often because there are no file descriptors left, is tried
/// again until it can be; that is said once.
///
/// # Cancel safety
///
/// Cancel safe.
pub async fn accept(listener: &TcpListener, whose: &str) -> (TcpStream, SocketAddr) {
    let mut is_said = false;
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                if !is_said {
                    tracing::warn!(%error, "no connection of {whose} can be accepted");
                    is_said = true;
                }
                time::sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_accepted_is_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // From here on each accept fails at once.
        socket2::SockRef::from(&listener).shutdown(std::net::Shutdown::Both).unwrap();
        listener.accept().await.unwrap_err();
        // Time passes only while everything waits.
        time::timeout(Duration::from_secs(1), accept(&listener, "a test")).await.unwrap_err();
    }
}
