# Answers every request with 200, from a few processes, and one for /slow after three seconds. Perl is in
# every Debian, however small.
use strict;
use warnings;
use IO::Socket::INET;

my $listener = IO::Socket::INET->new(
    LocalAddr => '127.0.0.1', LocalPort => 3000, Listen => 128, ReuseAddr => 1,
) or die "port 3000: $!";
for (1 .. 3) { last unless fork }
while (my $client = $listener->accept) {
    my $request = <$client> // '';
    while (defined(my $line = <$client>)) { last if $line =~ /^\r?\n$/ }
    sleep 3 if $request =~ m{^GET /slow };
    print $client "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n";
    close $client;
}
