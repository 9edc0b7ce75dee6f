//! A client with one connection that is kept alive: a request enters, its whole answer leaves, or the answer
//! piece by piece.

use std::net::SocketAddr;

use anyhow::Context;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Where requests go, and under which name.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) host: String,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Client {
    sender: http1::SendRequest<Full<Bytes>>,
    host: String,
}

impl Client {
    pub(crate) async fn connect(target: &Target) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(target.address).await.context("connecting")?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::Builder::new()
            // Large enough for a body of megabytes not to be the client's problem.
            .max_buf_size(1024 * 1024)
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::spawn(connection);
        Ok(Self { sender, host: target.host.clone() })
    }

    /// Sends a request; `POST` if there is a body. Anything but 200 is an error.
    pub(crate) async fn begin(
        &mut self,
        path: &str,
        body: Option<Bytes>,
    ) -> anyhow::Result<Response<Incoming>> {
        let response = self.answer(path, body).await?;
        let status = response.status();
        anyhow::ensure!(status == StatusCode::OK, "{path}: {status}");
        Ok(response)
    }

    /// Sends a request; `POST` if there is a body. Any status will do.
    pub(crate) async fn answer(
        &mut self,
        path: &str,
        body: Option<Bytes>,
    ) -> anyhow::Result<Response<Incoming>> {
        let method = if body.is_some() { http::Method::POST } else { http::Method::GET };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(
                header::USER_AGENT,
                "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
            )
            .header(header::ACCEPT, "*/*")
            .body(Full::new(body.unwrap_or_default()))?;
        self.sender.ready().await?;
        Ok(self.sender.send_request(request).await?)
    }

    /// Sends a request and reads its whole answer.
    pub(crate) async fn call(&mut self, path: &str, body: Option<Bytes>) -> anyhow::Result<Bytes> {
        let response = self.begin(path, body).await?;
        Ok(response.into_body().collect().await?.to_bytes())
    }
}
